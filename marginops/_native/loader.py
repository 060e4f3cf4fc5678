"""Finds the native kernels of a device type: built ahead of time, cached, built now, or none."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import architectures, jit, places, recipe
from .cache import Cache, say
from .plan import Plan, UnavailableError, csrc_folder, make_plan, torch_release
from .trust import RefusedError, closed_on_error, path_of_open


class NativeUnavailableWarning(RuntimeWarning):
    """The compiled kernels cannot be used, so the ops run in plain PyTorch, which is slower.

    The warning appears once per device type and process, and names the reason.
    """


@dataclass
class Outcome:
    """The implementation that a device type uses, and why it does not use a better one.

    Attributes:
        implementation: ``"ahead-of-time"``, ``"cached"``, ``"built now"`` or ``"reference"``.
        reasons: Why each better implementation is not used.
        asked_for: Whether the user or the kind of machine wants it so. Then there is no warning.
        library: The file of the loaded library.
        build_info: What the library says about its build.
        module: The loaded library.
    """

    implementation: str = "reference"
    reasons: list[str] = field(default_factory=list)
    asked_for: bool = True
    library: Path | None = None
    build_info: dict[str, Any] = field(default_factory=dict)
    module: ModuleType | None = field(default=None, repr=False)

    @property
    def native(self) -> bool:
        """Whether compiled kernels are registered."""
        return self.module is not None

    def reject(self, reason: str, asked_for: bool = False) -> None:
        """Note why a better implementation is not used."""
        self.reasons.append(reason)
        self.asked_for = self.asked_for and asked_for

    def accept(
        self, implementation: str, name: str, library: Path, opened_as: str | None = None
    ) -> None:
        """Load a library, which registers its kernels.

        Args:
            implementation: What the library is.
            name: The name of the module.
            library: The file of the library.
            opened_as: Another path of the same file, which the system's loader is to open.
        """
        full_name, path = f"{__package__}.{name}", opened_as or str(library)
        loader = importlib.machinery.ExtensionFileLoader(full_name, path)
        spec = importlib.util.spec_from_file_location(full_name, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        self.build_info = module.build_info()
        self.implementation, self.library, self.module = implementation, library, module


class Loader:
    """Loads the kernels of each device type at most once, and remembers the outcome."""

    def __init__(self, csrc: Path | None = None, installed: Path | None = None) -> None:
        self.csrc = csrc or csrc_folder()
        self.installed = installed or Path(__file__).parent
        self._outcomes: dict[str, Outcome] = {}
        self._lock = threading.RLock()
        # A process forked while another thread builds must not wait for that thread.
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()

    def load(self, device_type: str) -> bool:
        """Whether compiled kernels are registered. The first call finds or builds them.

        If there are none, one warning says why. There is no error.
        """
        outcome = self._outcomes.get(device_type)
        return (outcome or self.outcome(device_type)).native

    def outcome(self, device_type: str, build: bool = True) -> Outcome:
        """The outcome for a device type.

        With ``build=False`` nothing is compiled, and a failure is not remembered.
        """
        with self._lock:
            outcome = self._outcomes.get(device_type)
            if outcome is None:
                outcome = self._resolve(device_type, build)
                if build or outcome.native:
                    self._outcomes[device_type] = outcome
                    _warn(device_type, outcome)
        return outcome

    def _resolve(self, device_type: str, build: bool) -> Outcome:
        outcome = Outcome()
        if device_type not in recipe.SOURCE_PATTERNS:
            outcome.reject(f"there are no kernels for {device_type}", asked_for=True)
            return outcome
        try:
            self._try_ahead_of_time(device_type, outcome)
            if not outcome.native:
                self._try_just_in_time(device_type, outcome, build)
        except UnavailableError as error:
            outcome.reject(str(error), error.asked_for)
        except Exception as error:
            outcome.reject(f"{type(error).__name__}: {error}")
        return outcome

    def _try_ahead_of_time(self, device_type: str, outcome: Outcome) -> None:
        capability = torch.backends.cpu.get_cpu_capability()
        sets = recipe.instruction_sets(capability) if device_type == "cpu" else ["baseline"]
        for name in dict.fromkeys(recipe.module_name(device_type, each) for each in sets):
            for suffix in importlib.machinery.EXTENSION_SUFFIXES:
                library = self.installed / f"{name}{suffix}"
                if not library.is_file():
                    continue
                obstacle = _obstacle(library, device_type, self.csrc)
                if obstacle is None:
                    try:
                        return outcome.accept("ahead-of-time", name, library)
                    except ImportError as error:
                        obstacle = str(error)
                outcome.reject(f"the ahead-of-time library {library.name} is skipped: {obstacle}")
        if not outcome.reasons:
            outcome.reject("no ahead-of-time library is installed", asked_for=True)

    def _try_just_in_time(self, device_type: str, outcome: Outcome, build: bool) -> None:
        if jit.is_set("MARGINOPS_DISABLE_JIT"):
            raise UnavailableError("MARGINOPS_DISABLE_JIT is set", asked_for=True)
        plan = make_plan(device_type, self.csrc)
        refused: dict[Path, str] = {}
        try:
            candidates = places.candidates()
        except RefusedError as error:
            raise UnavailableError(str(error)) from error
        for step in (_load_cached, _build) if build else (_load_cached,):
            for place in candidates:
                if place in refused:
                    continue
                try:
                    step(place, plan, outcome)
                except (RefusedError, OSError) as error:
                    refused[place] = f"the cache folder {place} cannot be used: {error}"
                    if step is _build and place != candidates[-1]:
                        say(refused[place])
                if outcome.native:
                    outcome.reasons += refused.values()
                    return
        if build:
            raise UnavailableError("; ".join([*refused.values(), places.ADVICE]))
        outcome.reasons += refused.values()
        raise UnavailableError("not built yet", asked_for=True)


def _load_cached(place: Path, plan: Plan, outcome: Outcome) -> None:
    folder = places.find(place)
    if folder is not None:
        with folder:
            _load(Cache(folder), plan, outcome, "cached")


def _build(place: Path, plan: Plan, outcome: Outcome) -> None:
    with places.make(place) as folder:
        cache = Cache(folder)
        earlier = cache.failure(plan)
        with cache.lock():
            _load(cache, plan, outcome, "cached")
            if outcome.native:
                return
            # A build that failed while this process waited would fail again. A build that failed
            # before may succeed now.
            failure = cache.failure(plan)
            if failure is not None and failure != earlier:
                raise UnavailableError(failure.reason)
            jit.build(plan, cache)
            _load(cache, plan, outcome, "built now")
        if not outcome.native:
            raise RefusedError("the library was stored, and its content is another now")


def _load(cache: Cache, plan: Plan, outcome: Outcome, implementation: str) -> None:
    library = cache.find(plan)
    if library is None:
        return
    with closed_on_error(library.descriptor):
        places.check_executable(library.descriptor, library.path)
    # The C library knows loaded libraries by their paths. This path must not lead to another file
    # later. So the descriptor stays open until the process ends.
    opened_as = str(path_of_open(library.descriptor, library.path))
    try:
        outcome.accept(implementation, plan.name, library.path, opened_as)
    except ImportError as error:
        # The same inputs would give the same library, so nobody compiles it again.
        obstacle = str(error).replace(opened_as, str(library.path))
        raise UnavailableError(
            f"the library {library.path} is intact and does not load: {obstacle}; "
            f"to compile it again, delete {library.path.parent}"
        ) from error


def _obstacle(library: Path, device_type: str, csrc: Path) -> str | None:
    """Why a library that was built ahead of time cannot be used here; None if it can.

    The function reads the file, because to load a library that was built for another torch may
    crash the process.
    """
    found = re.search(rb"built for torch=(.*?) sources=(.*?) archs=(.*?);", library.read_bytes())
    if found is None:
        return "it does not say what it was built for"
    built_for, sources, archs_text = (part.decode() for part in found.groups())
    release, running = torch_release(built_for), torch_release(torch.__version__)
    if not recipe.OLDEST_TORCH <= release <= running:
        return f"built for torch {built_for}, running with torch {torch.__version__}"
    if sources != recipe.fingerprint(csrc, device_type):
        return f"built from other sources than those in {csrc}"
    archs = [arch for arch in archs_text.split(",") if arch]
    if archs:
        for capability in architectures.visible_capabilities():
            if not architectures.runs_on(archs, capability):
                gpu = "{}.{}".format(*capability)
                return f"built for GPU architecture {', '.join(archs)}, running with {gpu}"
    return None


def _warn(device_type: str, outcome: Outcome) -> None:
    if outcome.native or outcome.asked_for:
        return
    warnings.warn(
        f"marginops runs its {device_type} ops in plain PyTorch, which is slower: "
        f"{'; '.join(outcome.reasons)}. Run `marginops doctor` for details.",
        NativeUnavailableWarning,
        stacklevel=3,
    )
