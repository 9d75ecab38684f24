"""What is passed over in folders of images, and why: what a system, a NAS or this program has put there."""

from __future__ import annotations

from collections.abc import Collection

SHOWN = 4  # examples of a reason

SYSTEM_FOLDERS = "folders of a NAS or a system"
SYSTEM_FILES = "system files"
HIDDEN = "hidden"
OWN_RESULTS = "result folders of spade-faiss"
GALLERIES = "galleries"
UNREAD_FORMATS = "files in formats that are not read"
OTHER_FILES = "other files"
SPECIAL = "pipes, sockets or devices"
LOOPS = "links that lead back"
ONE = {  # how one of them is called
    SYSTEM_FOLDERS: "folder of a NAS or a system",
    SYSTEM_FILES: "system file",
    OWN_RESULTS: "result folder of spade-faiss",
    GALLERIES: "gallery",
    UNREAD_FORMATS: "file in a format that is not read",
    OTHER_FILES: "other file",
    SPECIAL: "pipe, socket or device",
    LOOPS: "link that leads back",
}

# Folders, in lower case, that a NAS (Synology, QNAP, NetApp, ZFS, Samba), an operating system or a tool makes.
_FOLDERS = frozenset(
    {
        "@eadir", "@eadir_tmp", "#recycle", "#snapshot", "@tmp", "@sharebin", "@recycle", "@recently-snapshot",
        ".@__thumb", ".@upload_cache", ".recycle", "~snapshot", ".snapshot", ".snapshots", ".zfs", "$recycle.bin",
        "system volume information", "found.000", "lost+found", "__macosx", ".trashes", ".fseventsd", ".spotlight-v100",
        ".temporaryitems", ".documentrevisions-v100", ".appledouble", "network trash folder", "temporary items",
        ".thumbnails", ".ipynb_checkpoints", "__pycache__", ".stversions", ".dropbox.cache", ".tmp.driveupload",
    }
)  # fmt: skip
_FILES = frozenset({".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", ".picasa.ini", "picasa.ini"})

_RESULT_FOLDERS = frozenset({"maps", "matches", "overlays"})  # of `query` and `audit`
_RESULT_FILES = frozenset({"results.jsonl", "scale.json"})


class PassedOver:
    """Counts by reason, with a few examples of each. It is True if anything was passed over."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._examples: dict[str, dict[str, None]] = {}

    def add(self, reason: str, example: str) -> None:
        """Count a file or a folder."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self._examples.setdefault(reason, {})
        if len(examples) <= SHOWN:
            examples[example] = None

    def update(self, other: PassedOver) -> None:
        """Add the counts of another."""
        for reason, n in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + n
            self._examples.setdefault(reason, {}).update(other._examples[reason])

    def only(self, reason: str) -> PassedOver:
        """Return the counts of one reason."""
        one = PassedOver()
        if reason in self.counts:
            one.counts[reason], one._examples[reason] = self.counts[reason], self._examples[reason]
        return one

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        parts = [
            f"{n} {ONE.get(reason, reason) if n == 1 else reason}{self._shown(reason)}"
            for reason, n in self.counts.items()
        ]
        return f"passed over: {', '.join(parts)}"

    def _shown(self, reason: str) -> str:
        examples = [example for example in self._examples[reason] if example]
        if not examples:
            return ""
        return f" ({', '.join(examples[:SHOWN])}{', ...' if len(examples) > SHOWN else ''})"


def system_folder(name: str) -> bool:
    """Return whether a folder of this name is one that a NAS, a system or a tool makes."""
    lower = name.lower()
    return lower in _FOLDERS or lower.startswith(".trash")


def system_file(name: str) -> str | None:
    """Return the example to show of a system file's name, as ._* of all resource forks of macOS; None: another."""
    if name.startswith("._"):
        return "._*"
    return name if name.lower() in _FILES else None


def own_folders(names: Collection[str]) -> tuple[str, frozenset[str]] | None:
    """Recognise a folder that this program has written, by the names in it.

    A folder that is only called "results" is not one.

    Returns:
        the reason, and the names of the folders in it to pass over; None: another folder.
    """
    there = frozenset(names)
    if {"gallery.json", "shards"} <= there:
        return GALLERIES, frozenset({"shards", "index"})
    files, folders = there & _RESULT_FILES, there & _RESULT_FOLDERS
    if (files and folders - {"maps"}) or (len(files) == 2 and folders) or folders == _RESULT_FOLDERS:
        return OWN_RESULTS, folders
    if {"metrics.json", "results.csv"} <= there:  # of `evaluate`
        return OWN_RESULTS, frozenset({"anomaly_maps"})
    return None
