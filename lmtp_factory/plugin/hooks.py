"""Post-import hooks on LLaMA-Factory's modules, and a record of which hooks ran.

Each seam names an upstream module. The file of the same path in `seams/` extends it. The extension runs directly after the
module's own code, before an importer can copy a name out of the module. A failing extension is recorded and printed to
stderr, and LLaMA-Factory keeps working; `require_all` then refuses L-MTP stages, so that they never train plain SFT. The
seams of LLaMA Board are separate: training neither needs nor imports them.

Standard library only, see `autoload`.
"""

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..errors import LMTPError
from .versions import PACKAGE, TRIED_SOURCES, TRIED_VERSIONS, requirement, unknown_entries


@dataclass(frozen=True)
class Seam:
    """One upstream module that the plugin extends.

    Attributes:
        module: name of the module inside LLaMA-Factory. `seams/` holds the extension under the same path.
        purpose: what the extension adds, as `lmtp-cli doctor` prints it.
    """

    module: str
    purpose: str

    @property
    def name(self) -> str:
        return f"{PACKAGE}.{self.module}"


SEAMS = (
    Seam("extras.constants", "the stages' names, heads as checkpoints"),
    Seam("hparams.finetuning_args", "the L-MTP keys of YAML and command line"),
    Seam("hparams.parser", "keys checked and heads located before a model loads"),
    Seam("data.template", "the template of self-distilled data"),
    Seam("data.parser", "dataset names that need no dataset_dir"),
    Seam("model.loader", "heads attached to the loaded model, export"),
    Seam("train.callbacks", "per-head metrics in trainer_log.jsonl"),
    Seam("train.sft.workflow", "training of the two stages"),
    Seam("chat.hf_engine", "chat, api and web UI answer with the heads"),
    Seam("chat.chat_model", "the keys that chat and api read, log lines between answers"),
)

# What the web UI shows. If one is missing, the Board is upstream's own in that place, and training is not affected.
BOARD_SEAMS = (
    Seam("webui.locales", "labels and explanations in five languages"),
    Seam("webui.control", "per-head curves while the Board trains"),
    Seam("webui.css", "style of the lines below an answer"),
    Seam("webui.runner", "commands and saved arguments of the two stages"),
    Seam("webui.components.train", "the L-MTP panel of the Train tab"),
    Seam("webui.components.export", "export with the heads from the Export tab"),
    Seam("webui.components.chatbot", "the decoding switch of the Chat tab"),
    Seam("webui.chatter", "speed and drafted tokens of an answer"),
)

_seams = {seam.name: seam for seam in (*SEAMS, *BOARD_SEAMS)}
_attached: set[str] = set()
_failures: dict[str, str] = {}
_warned: set[str] = set()  # versions that a run has been warned of
_waiting: list[Seam] = []  # seams whose modules were being imported when the hooks were installed


class _ExtendingLoader:
    """Runs the module's own loader, then the extension."""

    def __init__(self, loader, seam: Seam):
        self._loader, self._seam = loader, seam

    def __getattr__(self, name: str):  # resource readers, source inspection
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _extend(self._seam, module)


class _Finder:
    """Wraps the loaders of the seams' modules; leaves every other import alone."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.startswith(f"{PACKAGE}."):  # not while some other package is half-way through its import
            apply_pending()
        seam = _seams.get(fullname)
        if seam is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                spec.loader = _ExtendingLoader(spec.loader, seam)
                return spec
        return None


def install() -> None:
    """Install the hooks, once per process.

    LLaMA-Factory itself imports torch, so some of its modules may be imported already, completely or half.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    _waiting.extend(seam for seam in _seams.values() if seam.name in sys.modules)
    apply_pending()


def apply_pending() -> None:
    """Extend modules that were being imported when the hooks were installed and are complete now."""
    for seam in list(_waiting):
        module = sys.modules.get(seam.name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _waiting.remove(seam)
            before = dict(vars(module))
            _extend(seam, module)
            _rebind([(old, vars(module).get(name)) for name, old in before.items()])


def _rebind(replacements: list[tuple[object, object]]) -> None:
    """Replace objects in importers that copied a name out of a module before it was extended."""
    replaced = {id(old): new for old, new in replacements if new is not None and new is not old}
    importers = [module for name, module in list(sys.modules.items()) if name.startswith(f"{PACKAGE}.") and module]
    for module in importers:
        for name, value in list(vars(module).items()):
            if id(value) in replaced:
                setattr(module, name, replaced[id(value)])


def _extend(seam: Seam, module: ModuleType) -> None:
    try:
        importlib.import_module(f".seams.{seam.module}", __package__).extend(module)
    except Exception as error:
        fail(seam.name, error)
    else:
        _attached.add(seam.name)
        _failures.pop(seam.name, None)


def _fail(seam: Seam, reason: str) -> None:
    _failures[seam.name] = reason
    _attached.discard(seam.name)  # a reloaded module has lost its extension
    lost = "LLaMA Board goes on without it" if seam in BOARD_SEAMS else "L-MTP stages are off"
    print(f"lmtp_factory: cannot extend {seam.name} of LLaMA-Factory {version()} ({reason}); {lost}.", file=sys.stderr)


def fail(name: str, error: Exception) -> None:
    """Record that an attached seam does not fit after all."""
    _fail(_seams[name], f"{type(error).__name__}: {error}")


def version() -> str:
    """LLaMA-Factory's installed version."""
    from importlib import metadata

    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def attach_all(seams: Iterable[Seam] = SEAMS) -> dict[str, str | None]:
    """Import the seams' modules.

    Returns:
        Name of each seam to None if it is attached, else to the reason.
    """
    for seam in seams:
        if seam.name in _attached or seam.name in _failures:
            continue
        try:
            importlib.import_module(seam.name)
            apply_pending()
        except Exception as error:
            _failures[seam.name] = f"{type(error).__name__}: {error}"
        if seam.name not in _attached:
            _failures.setdefault(seam.name, "its hook did not run")
    return {seam.name: None if seam.name in _attached else _failures[seam.name] for seam in seams}


def require_all() -> None:
    """Check that every seam of `SEAMS` is attached, and that the installed version may train L-MTP stages.

    A version that was not tried may, with a warning, if every seam fits and it has no unknown way to train.

    Raises:
        LMTPError: A seam is missing, or an untried version has an unknown way to train; the message names both.
    """
    missing = [f"{name} ({reason})" for name, reason in attach_all().items() if reason is not None]
    if missing:
        raise LMTPError(
            f"L-MTP cannot run with LLaMA-Factory {version()}, because it could not extend {', '.join(missing)}: "
            f"install {requirement()} or run lmtp-cli doctor."
        )
    if version() in TRIED_VERSIONS or version() in _warned:
        return
    if unknown := unknown_entries():
        raise LMTPError(
            f"L-MTP cannot run with LLaMA-Factory {version()}, which was not tried and trains by ways that lmtp_factory "
            f"does not know ({', '.join(unknown)}): install {requirement()} or a newer lmtp_factory."
        )
    from . import log

    _warned.add(version())
    tried = (
        f"is in development and was tried with L-MTP as of {TRIED_SOURCES[version()]}"
        if version() in TRIED_SOURCES
        else f"was not tried with L-MTP ({', '.join(TRIED_VERSIONS)} was)"
    )
    log.warning(f"LLaMA-Factory {version()} {tried}. All hooks fit, so the run goes on; check its first results.")


def expect(module: ModuleType, name: str, *names: str):
    """Return the attribute `name` of an upstream module, after checking that it takes the parameters `names`.

    Raises:
        AttributeError: The module has no such attribute.
        TypeError: The attribute takes other parameters.
    """
    value = getattr(module, name)
    missing = set(names) - set(parameters(value)) if names else ()
    if missing:
        raise TypeError(f"{name} no longer takes {', '.join(sorted(missing))}")
    return value


def parameters(function: Callable) -> Mapping[str, Any]:
    """Parameters of an upstream function, in order."""
    import inspect

    return inspect.signature(function).parameters


@contextmanager
def replaced(module: ModuleType, **attributes: Any) -> Iterator[None]:
    """Set attributes of an upstream module inside the context."""
    before = {name: getattr(module, name) for name in attributes}
    vars(module).update(attributes)
    try:
        yield
    finally:
        vars(module).update(before)
