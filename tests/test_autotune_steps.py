"""Where a search's seconds went, and what the compiler did meanwhile."""

from __future__ import annotations

import sys
import time
import types

import pytest

from tests.support.fake_gpu import module_with
from tetris.autotune.steps import Steps


def test_seconds_add_up_also_of_what_fails() -> None:
    steps = Steps()
    for _ in range(2):
        with steps.timed("nap"):
            time.sleep(0.01)
    with pytest.raises(KeyError), steps.timed("fall"):
        raise KeyError
    assert set(steps.seconds) == {"nap", "fall"} and 0.02 <= steps.seconds["nap"] < 5 > steps.seconds["fall"] >= 0


def test_only_what_is_compiled_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = types.SimpleNamespace(compilation=types.SimpleNamespace(listener="another"))
    monkeypatch.setitem(sys.modules, "triton", module_with("triton", knobs=knobs))
    steps, times = Steps(), types.SimpleNamespace(total=500_000)
    with steps.watching_the_compiler():
        knobs.compilation.listener(src=None, metadata={"name": "conv"}, metadata_group={}, times=times, cache_hit=False)
        knobs.compilation.listener(src=None, metadata={"name": "gemm"}, metadata_group={}, times=times, cache_hit=True)
    assert steps.kernels == ["conv"] and steps.seconds == {"compiler": 0.5}
    assert knobs.compilation.listener == "another", "the listener before is back"


def test_a_triton_that_cannot_tell_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", module_with("triton"))
    steps = Steps()
    with steps.watching_the_compiler():
        pass
    assert steps == Steps()
