"""How many draft tokens pay off."""

from engine.draft.speculator import Speculator, best_draft_length
from engine.request import Request
from engine.sequence import Sequence


class Parrot:
    def propose(self, sequence: Sequence, max_tokens: int) -> tuple[int, ...]:
        return (1,) * max_tokens


def sequence() -> Sequence:
    return Sequence(Request(id="r", prompt=(1,)), arrival=0)


def test_drafts_are_as_long_as_allowed_if_tokens_cost_nothing() -> None:
    assert best_draft_length(0.5, 8, 1, (0.01, 0.0)) == 8


def test_there_are_no_drafts_if_only_tokens_cost_time() -> None:
    assert best_draft_length(0.9, 8, 1, (0.0, 0.01)) == 0


def test_drafts_get_shorter_the_more_sequences_share_a_step() -> None:
    lengths = [best_draft_length(0.7, 8, count, (0.02, 0.002)) for count in (1, 2, 4, 8, 16, 64)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 1
    assert lengths[-1] == 0


def test_drafts_that_are_never_accepted_stop_and_are_tried_again_later() -> None:
    speculator, one = Speculator(Parrot(), max_tokens=8, step_line=lambda: (0.01, 0.004)), sequence()
    drafted = []
    for _ in range(200):
        draft = speculator.draft(one, room=8, num_sequences=1)
        drafted.append(len(draft))
        if draft:
            speculator.note_verified(one, len(draft), 0)
    assert drafted[0] > 0
    assert sum(map(bool, drafted)) < 30
    assert any(drafted[100:])


def test_drafts_that_are_always_accepted_have_full_length() -> None:
    speculator, one = Speculator(Parrot(), max_tokens=8, step_line=lambda: (0.01, 0.002)), sequence()
    for _ in range(30):
        speculator.note_verified(one, 8, 8)
    assert len(speculator.draft(one, room=8, num_sequences=1)) == 8
    assert (speculator.num_drafted, speculator.num_accepted) == (240, 240)


def test_a_draft_is_never_longer_than_its_room() -> None:
    speculator = Speculator(Parrot(), max_tokens=8, step_line=lambda: (0.0, 0.0))
    assert speculator.draft(sequence(), room=3, num_sequences=1) == (1, 1, 1)


def test_drafting_pauses_when_not_even_sure_drafts_would_pay() -> None:
    line = [(0.01, 0.001)]
    speculator, one = Speculator(Parrot(), max_tokens=8, step_line=lambda: line[0]), sequence()
    for _ in range(30):
        speculator.note_verified(one, 8, 8)
    speculator.update_pause(1)
    assert not speculator.is_paused
    speculator.update_pause(1000)
    assert speculator.is_paused
    assert speculator.draft(one, room=8, num_sequences=1) == ()
    speculator.update_pause(1)
    assert len(speculator.draft(one, room=8, num_sequences=1)) == 8


def test_drafting_resumes_later_than_it_paused() -> None:
    speculator = Speculator(Parrot(), max_tokens=8, step_line=lambda: (0.0105, 0.01))
    awake_at, resting_at = [], []
    for count in range(1, 60):
        for resting, kept in ((False, awake_at), (True, resting_at)):
            speculator.is_paused = resting
            speculator.update_pause(count)
            if not speculator.is_paused:
                kept.append(count)
    assert resting_at == awake_at[: len(resting_at)]
    assert len(resting_at) < len(awake_at)
