"""The cost of self-distillation: every variant trains, and the kept logits are really taken over."""

from typing import Any

import pytest

from benchmarks import self_distillation
from benchmarks.tables import measured_table
from toolchain.methods.self_distillation import TeacherLogits


def test_every_variant_is_measured_and_logits_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    compute = TeacherLogits._computed

    def counted(self: TeacherLogits, *arguments: Any) -> Any:
        computed.append(1)
        return compute(self, *arguments)

    monkeypatch.setattr(TeacherLogits, "_computed", counted)
    found = self_distillation.measure(rounds=1, threads=1, quick=True)
    assert list(found["rows"]) == list(self_distillation.VARIANTS)
    assert len(computed) == 2  # by KEPT of the warm-up and of the round, by no other
    assert all(row["samples_per_second"] > 0 for row in found["rows"].values())
    assert found["rows"][self_distillation.PLAIN]["epoch_time_vs_plain"] == 1
    assert "| skd, logits taken over |" in measured_table(found, "self_distillation")
