"""The public names of TensorRT, version by version, of the classes that hydra-edge touches.

`tensorrt_api.json` beside the tests' data has a group of names per set of versions that have them.
It was read off the real bindings. To add classes, or to read it again:

    python tests/tensorrt_api.py FOLDER [CLASS …]

with a folder of ``VERSION.json`` files ({class: [member, …]}), one for each version of TensorRT,
and tensorrt-rtx installed.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

FILE = Path(__file__).parent / "data" / "tensorrt_api.json"
TENSORRT = ("10.3", "10.8", "10.13", "10.16", "11.4")
RTX = "rtx1.7"
VERSIONS = (*TENSORRT, RTX)
MODULE = "tensorrt"  # what the names of the module itself are filed under
CLASSES = tuple(name for name in json.loads(FILE.read_text()) if name != MODULE)

Names = Mapping[str, frozenset[str]]  # class, or `MODULE` -> its public names


def load() -> dict[str, Names]:
    """The names of every version, as committed."""
    found: dict[str, dict[str, set[str]]] = {version: {} for version in VERSIONS}
    for owner, groups in json.loads(FILE.read_text()).items():
        for versions, names in groups.items():
            for version in versions.split():
                found[version].setdefault(owner, set()).update(names.split())
    return {
        version: {owner: frozenset(names) for owner, names in owners.items()}
        for version, owners in found.items()
    }


def of_lists(folder: Path, classes: Sequence[str] = CLASSES) -> dict[str, Names]:
    """The names in files ``VERSION.json``, by the version's first two numbers."""
    return {
        ".".join(path.stem.split(".")[:2]): _selected(json.loads(path.read_text()), classes)
        for path in folder.glob("*.json")
    }


def of_rtx(classes: Sequence[str] = CLASSES) -> Names:
    """The names of the TensorRT-RTX that is installed."""
    module = importlib.import_module("tensorrt_rtx")
    listed = {
        name: dir(value) if inspect.isclass(value) else type(value).__name__
        for name, value in vars(module).items()
    }
    return _selected(listed, classes)


def _selected(listed: Mapping[str, list[str] | str], classes: Sequence[str]) -> Names:
    """The module's own names, without modules it imported, and the members of ``classes``."""
    found = {MODULE: frozenset(n for n, of in listed.items() if n[0] != "_" and of != "module")}
    for owner in classes:
        members = frozenset(name for name in listed.get(owner, ()) if name[0] != "_")
        if members:
            found[owner] = members
    return found


def dump(api: Mapping[str, Names]) -> str:
    """The committed form: class -> versions -> names, in a stable order."""
    result: dict[str, dict[str, str]] = {}
    owners = {owner for names in api.values() for owner in names}
    for owner in (MODULE, *sorted(owners - {MODULE})):
        groups: dict[str, list[str]] = {}
        for name in sorted({name for names in api.values() for name in names.get(owner, ())}):
            having = [v for v in VERSIONS if name in api[v].get(owner, ())]
            groups.setdefault(" ".join(having), []).append(name)
        result[owner] = {versions: " ".join(groups[versions]) for versions in sorted(groups)}
    return json.dumps(result, indent=1) + "\n"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    wanted = sorted({*CLASSES, *sys.argv[2:]})
    FILE.write_text(dump({**of_lists(Path(sys.argv[1]), wanted), RTX: of_rtx(wanted)}))
