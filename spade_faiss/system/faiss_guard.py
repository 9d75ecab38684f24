"""Refuses an installation of FAISS that cannot work, in one line, before anything else imports it.

faiss-cpu and faiss-gpu are the same module. Where both were installed and one was removed, part of the module is gone.
"""

from __future__ import annotations

ADVICE = "remove both and install exactly one: pip uninstall faiss-cpu faiss-gpu; pip install faiss-cpu (or faiss-gpu)"


def require_faiss() -> None:
    """Check that the module faiss is there and whole.

    Raises:
        ImportError: it is not.
    """
    try:
        import faiss
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ImportError(
            f"faiss: expected faiss-cpu or faiss-gpu, found none that loads ({reason}); {ADVICE}"
        ) from None
    if not hasattr(faiss, "IndexFlat"):
        places = getattr(faiss, "__file__", None) or ", ".join(getattr(faiss, "__path__", []))
        raise ImportError(
            f"faiss: expected faiss-cpu or faiss-gpu, found part of a module at {places}, as is left when one of "
            f"both is removed; {ADVICE}"
        )


require_faiss()
