"""Post-import hooks on LLaMA-Factory's modules, and the record of which of them ran.

Each seam names a module of LLaMA-Factory and a function of ours that extends it. The function runs right after the
module's own code, before any importer can copy a name out of it. Whatever goes wrong is recorded and told on stderr,
but leaves LLaMA-Factory working; :func:`require_all` then refuses L-MTP stages (they never train plain SFT instead). The
seams of LLaMA Board stand apart: training neither needs nor imports them.

Standard library only: see :mod:`.autoload`.
"""

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..errors import LMTPError


PACKAGE = "llamafactory"
SUPPORTED_VERSION = "0.9.5"


@dataclass(frozen=True)
class Seam:
    """One place where LLaMA-Factory is extended.

    Attributes:
        module: LLaMA-Factory's module, without the package's name.
        extend: ``module:function`` of this package; called with the imported module.
        purpose: what the seam is for, as ``lmtp-cli doctor`` prints it.
    """

    module: str
    extend: str
    purpose: str

    @property
    def name(self) -> str:
        return f"{PACKAGE}.{self.module}"


SEAMS = (
    Seam("extras.constants", "stages:extend_constants", "the stages' names, heads as checkpoints"),
    Seam("hparams.finetuning_args", "arguments:extend_finetuning_args", "the L-MTP keys of YAML and command line"),
    Seam("hparams.parser", "checks:extend_parser", "bad input refused before a model loads"),
    Seam("data.template", "datasets:extend_template", "the template of self-distilled data"),
    Seam("data.parser", "datasets:extend_parser", "dataset names that need no dataset_dir"),
    Seam("model.loader", "loading:extend_loader", "heads attached to the loaded model, export"),
    Seam("train.callbacks", "trainer_log:extend_callbacks", "per-head metrics in trainer_log.jsonl"),
    Seam("train.sft.workflow", "workflow:extend_workflow", "training of the two stages"),
    Seam("chat.hf_engine", "chat:extend_engine", "chat, api and web UI answer with the heads"),
    Seam("chat.chat_model", "chat:extend_chat_model", "log lines between the answers of chat"),
)

# What the web UI shows. Where one is missing the Board is upstream's own in that place, and training goes on.
BOARD_SEAMS = (
    Seam("webui.locales", "webui.locales:extend_locales", "labels and explanations in five languages"),
    Seam("webui.control", "webui.curves:extend_control", "per-head curves while the Board trains"),
    Seam("webui.css", "webui.answer:extend_css", "the look of what is told about an answer"),
    Seam("webui.runner", "webui.runner:extend_runner", "commands and saved arguments of the two stages"),
    Seam("webui.components.train", "webui.panel:extend_train", "the L-MTP panel of the Train tab"),
    Seam("webui.components.export", "webui.export:extend_export", "export with the heads from the Export tab"),
    Seam("webui.components.chatbot", "webui.chat:extend_chatbot", "the decoding switch of the Chat tab"),
    Seam("webui.chatter", "webui.chat:extend_chatter", "speed and drafted tokens of an answer"),
)

_seams = {seam.name: seam for seam in (*SEAMS, *BOARD_SEAMS)}
_attached: set[str] = set()
_failures: dict[str, str] = {}
_waiting: list[Seam] = []  # their modules were being imported when we were installed


class _ExtendingLoader:
    """The module's own loader, followed by our extension."""

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
    """Put the hooks in place, once per process.

    LLaMA-Factory itself imports torch, so some of its modules may be there already, or half-way through.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    _waiting.extend(seam for seam in _seams.values() if seam.name in sys.modules)
    apply_pending()


def apply_pending() -> None:
    """Extend what was being imported when we were installed and is complete by now."""
    for seam in list(_waiting):
        module = sys.modules.get(seam.name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _waiting.remove(seam)
            before = dict(vars(module))
            _extend(seam, module)
            _rebind([(old, vars(module).get(name)) for name, old in before.items()])


def _rebind(replacements: list[tuple[object, object]]) -> None:
    """Give importers that copied a name out of a module the object that has taken its place."""
    replaced = {id(old): new for old, new in replacements if new is not None and new is not old}
    importers = [module for name, module in list(sys.modules.items()) if name.startswith(f"{PACKAGE}.") and module]
    for module in importers:
        for name, value in list(vars(module).items()):
            if id(value) in replaced:
                setattr(module, name, replaced[id(value)])


def _extend(seam: Seam, module: ModuleType) -> None:
    try:
        file, function = seam.extend.split(":")
        extend: Callable[[ModuleType], None] = getattr(importlib.import_module(f".{file}", __package__), function)
        extend(module)
    except Exception as error:
        fail(seam.name, error)
    else:
        _attached.add(seam.name)
        _failures.pop(seam.name, None)


def _fail(seam: Seam, reason: str) -> None:
    _failures[seam.name] = reason
    _attached.discard(seam.name)  # a module that is reloaded comes back without its extension
    lost = "LLaMA Board goes on without it" if seam in BOARD_SEAMS else "L-MTP stages are off"
    print(f"lmtp_factory: cannot extend {seam.name} of LLaMA-Factory {version()} ({reason}); {lost}.", file=sys.stderr)


def fail(name: str, error: Exception) -> None:
    """Record that a seam which had attached turned out not to fit."""
    _fail(_seams[name], f"{type(error).__name__}: {error}")


def version() -> str:
    """LLaMA-Factory's installed version."""
    from importlib import metadata

    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def attach_all(seams: Iterable[Seam] = SEAMS) -> dict[str, str | None]:
    """Import the seams' modules. Each seam's name with None where it is attached, else the reason why not."""
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
    """Refuse to go on unless every seam that training needs is attached.

    Raises:
        LMTPError: naming LLaMA-Factory's version and each seam that is missing.
    """
    missing = [f"{name} ({reason})" for name, reason in attach_all().items() if reason is not None]
    if missing:
        raise LMTPError(
            f"L-MTP cannot run with LLaMA-Factory {version()}, because it could not extend {', '.join(missing)}: "
            f"install {PACKAGE}=={SUPPORTED_VERSION} or run lmtp-cli doctor."
        )


def expect(module: ModuleType, name: str, *names: str):
    """The attribute ``name`` of an upstream module, checked to take the parameters ``names``.

    Raises:
        AttributeError, TypeError: the layout is not the one that this package was written for.
    """
    value = getattr(module, name)
    missing = set(names) - set(parameters(value)) if names else ()
    if missing:
        raise TypeError(f"{name} no longer takes {', '.join(sorted(missing))}")
    return value


def parameters(function: Callable) -> Mapping[str, Any]:
    """An upstream function's parameters, in their order."""
    import inspect

    return inspect.signature(function).parameters
