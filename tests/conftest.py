"""Fixtures of every test: fresh random data whose seed a failing test shows; what imports leave is
never searched for garbage.
"""

import gc
import os
import secrets
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")  # each file's end does, below

STARTING_PROCESSES = ("test_another_device.py", "test_custom_models.py", "test_distributed.py", "test_examples.py")
LONG = ("test_exported_programs.py", "test_command_line.py", "test_distributions.py", "test_check_breakages.py")
LONG += ("test_accelerate_callback.py",)
"""Each has a test of ten seconds or more."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports make a million objects, which each full collection, such as a Trainer asks for, would
    take half a second to go through. What torch.compile and torch.export trace lives on, so that to
    look through it again and again is in vain: each file's end does.
    """
    gc.disable()
    collected = yield
    _leave_guards_untimed()
    gc.freeze()
    gc.set_threshold(50_000, 5, 20)
    gc.enable()
    return collected


def _leave_guards_untimed() -> None:
    """torch.compile times what it has made to tell calls apart, for a metric alone, after it has
    emptied the processor's caches: tens of milliseconds for each compilation.
    """
    guards = sys.modules.get("torch._dynamo.guards")
    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *_: 0.0  # type: ignore[union-attr]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that start processes with PEFT come first, so that one of two processes makes the
    server of helpers/forked.py, which imports for seconds, and the other never does; then long
    ones, none of which may be the last, when the other process has nothing left to do.
    """
    items.sort(key=lambda item: (item.path.name not in STARTING_PROCESSES, item.path.name not in LONG))


@pytest.fixture(scope="module", autouse=True)
def _only_new_garbage() -> Iterator[None]:
    """What a file's tests have loaded and left is frozen too."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def seed() -> int:
    """A fresh seed, printed; TEST_SEED in the environment repeats one."""
    seed = int(os.environ.get("TEST_SEED", secrets.randbits(31)))
    print(f"TEST_SEED={seed}")
    return seed


@pytest.fixture
def process_group() -> Iterator[None]:
    """A gloo group of this process alone, which nothing that a test wraps outlives.

    A DDP module that is the last to hold the group waits in its destructor for the group's threads,
    with Python's lock held: for ever where one of them needs it. Python's own reference lets go of
    the lock first.
    """
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    last = distributed.group.WORLD
    yield
    gc.collect()
    distributed.destroy_process_group()
    del last
