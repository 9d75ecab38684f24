"""What torch and FAISS see of this machine's GPUs, and where `auto` puts each stage by it."""

from __future__ import annotations

from typing import Any

from . import gpu_costs

STAGES = {"network": "torch", "patch search": "torch", "image index": "FAISS"}


def devices_seen() -> dict[str, Any]:
    """Return versions, GPUs and the places of stages, as JSON values.

    Returns:
        "torch": version, cuda (of its build, None: a build without), gpus: name, capability, bytes and free_bytes.
        "faiss": version, gpus (a number), options that it was compiled with.
        "auto": by stage, "cpu" or "cuda:0".
        "measured": the card whose costs `auto` goes by.
    """
    import faiss
    import torch

    gpus = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        gpus.append({
            "name": facts.name,
            "capability": f"{facts.major}.{facts.minor}",
            "bytes": int(facts.total_memory),
            "free_bytes": int(torch.cuda.mem_get_info(number)[0]),
        })  # fmt: skip
    faiss_gpus = int(getattr(faiss, "get_num_gpus", lambda: 0)())
    seen = {"torch": len(gpus), "FAISS": faiss_gpus}
    return {
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus},
        "faiss": {
            "version": faiss.__version__,
            "gpus": faiss_gpus,
            "options": str(getattr(faiss, "get_compile_options", lambda: "")()).strip(),
        },
        "auto": {stage: "cuda:0" if seen[library] else "cpu" for stage, library in STAGES.items()},
        "measured": gpu_costs.MEASURED.card,
    }


def advice(seen: dict[str, Any]) -> str:
    """Return what to do so that a GPU is used, in a sentence; what is in order needs none, and gets an empty string."""
    if not seen["torch"]["gpus"]:
        if seen["torch"]["cuda"] is None:
            return "this build of torch has no CUDA: for a GPU install one that has, with its own torchvision"
        return "torch was built with CUDA and sees no GPU: nvidia-smi says whether there is one, and its driver"
    if not seen["faiss"]["gpus"]:
        return "torch sees a GPU and FAISS none: faiss-gpu (Linux, x86-64) has it; the image index stays on the CPU"
    return ""
