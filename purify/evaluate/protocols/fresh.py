"""What every run reports: fresh purifications, which no attack has seen."""

from __future__ import annotations

from collections.abc import Iterator

from purify.evaluate.metrics import Estimate
from purify.evaluate.protocols.base import Attacked, Effort, Line, Protocol, Stage
from purify.evaluate.runner import CLEAN, Defence, results

WORDS = {
    "mean": "mean over {} purifications",
    "any_of_r": "right in all {} purifications",
    "majority": "right by majority of {} purifications",
}
ASSUMES = {
    "mean": "knows the defence, not the noise; submits once",
    "any_of_r": "knows the defence, not the noise; submits one image {} times",
    "majority": "knows the defence, not the noise, and attacks single purifications",
}


class Fresh(Protocol):
    """Fresh purifications of the worst attack's images: mean, any of R, majority. What every run reports."""

    name = "fresh"

    def stages(self, attacked: Attacked) -> Iterator[Stage]:
        return iter(())

    def planned(self, defence: Defence, effort: Effort) -> float:
        return 0.0

    def lines(self, attacked: Attacked) -> list[Line]:
        defence = attacked.defence
        found: dict[str, dict[str, Estimate]] = results(attacked.run, [defence], attacked.samples)[defence.name]
        return [
            Line(
                self.name,
                words.format(defence.draws),
                found["worst case"][criterion],
                found[CLEAN][criterion],
                0.0,
                ASSUMES[criterion].format(defence.draws),
            )
            for criterion, words in WORDS.items()
        ]
