"""What the benchmark of draft models compares: deeper models that say the same, served with a draft and without."""

from pathlib import Path

import pytest

from benchmarks.speculative_decoding import ServedModel, with_layers
from engine.errors import WorkersLost
from engine.plan import StepPlan
from tests.engine.run.tiny_models import write_dense


def test_layers_that_add_nothing_change_no_answer_and_what_was_served_is_closed(tmp_path: Path) -> None:
    model = write_dense(tmp_path, vocab_size=10_000)
    deep = with_layers(model, tmp_path / "deep", 4)
    served = [ServedModel("as it is", model, None), ServedModel("deep", deep, None), ServedModel("drafted", deep, model)]
    for one in served:
        one.run(streams=2, tokens=6)
        one.close()
        with pytest.raises(WorkersLost):
            one.engine.executor.submit(StepPlan(99, ())).result()
    assert served[0].answers == served[1].answers == served[2].answers
