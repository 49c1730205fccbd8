"""Whose adversarial images deceive whom: those made for one defence, judged on another, as a matrix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from purify.attacks.threats import stated
from purify.evaluate.attacking import Prepared, prepare
from purify.evaluate.description import Evaluation
from purify.evaluate.metrics import Estimate, summarize
from purify.evaluate.pictures import panels, save
from purify.evaluate.progress import Progress, cost
from purify.evaluate.provenance import default_folder, environment
from purify.evaluate.records import SCHEMA, RunFolder, differences, image_path, read_image, write_json
from purify.evaluate.runner import CLEAN, Defence, Samples, batches, judge
from purify.leaderboard.groups import measurements, threat
from purify.leaderboard.rows import Row, load_manifest, load_records


@dataclass(frozen=True)
class Party:
    """A defence of a finished run: a source of adversarial images, and a target of others'.

    Attributes:
        name: what the matrix calls it; unlike all others'.
        row: what the run says of it.
    """

    name: str
    row: Row

    @property
    def run(self) -> Path:
        """Its run's folder."""
        return Path(self.row.run)

    @property
    def title(self) -> str:
        """Its name with the attack that made its images: the one that left least of it."""
        return f"{self.name} ({self.row.strongest})"

    def records(self, stage: str) -> list[dict[str, Any]]:
        """The run's own records of a stage, by sample."""
        return load_records(self.run / "records.jsonl")[self.row.name, stage]

    def images(self, batch: Samples) -> torch.Tensor:
        """Its adversarial images of these samples."""
        paths = [image_path(self.run, self.row.name, self.row.strongest, int(i)) for i in batch.ids]
        return torch.stack([torch.from_numpy(read_image(path)) for path in paths]).to(batch.images)


@dataclass(frozen=True)
class Matrix:
    """Mean accuracy of targets, over their own judging draws, on the images of sources.

    Attributes:
        folder: where records, transfer.json and transfer.png are.
        parties: sources and targets, in order.
        cells: by source and target; of a target's own images it is the run's own number.
        clean: by target, on clean images.
    """

    folder: Path
    parties: tuple[Party, ...]
    cells: dict[tuple[str, str], Estimate]
    clean: dict[str, Estimate]

    def table(self) -> pd.DataFrame:
        """Percentages with intervals: a row for each source, a column for each target."""
        rows = {CLEAN: {t.name: str(self.clean[t.name]).strip() for t in self.parties}}
        for s in self.parties:
            rows[s.title] = {t.name: str(self.cells[s.name, t.name]).strip() for t in self.parties}
        return pd.DataFrame.from_dict(rows, orient="index")


def transfer(runs: Sequence[Path], out: Path | None, device: str | None, command: str, progress: bool = True) -> Matrix:
    """Judge the images of every defence of the runs on all others; resumes what ``out`` holds.

    Every target is judged on the draws that judged its own images, so a column is paired.

    Args:
        runs: folders of finished runs on the same images within the same bound.
        out: where records go (default: a folder below runs/ of these defences).
        device: where targets run; None: where their runs did.
        command: what is noted as having made it.
        progress: whether a bar is shown.

    Raises:
        ValueError: runs on other images or within another bound, or that cannot be rebuilt as they were.
    """
    found = parties(runs)
    check_paired(found)
    config = {"transfer": {p.name: {"defence": p.row.config, "attack": p.row.strongest, **_keys(p)} for p in found}}
    targets = {run: rebuild(run, device) for run in dict.fromkeys(p.run for p in found)}
    first = next(iter(targets.values()))
    path = out or default_folder("transfer", config)
    with RunFolder(path, config, environment(first.request.device, command, first.ranks)) as folder:
        with Progress(_work(found, targets), progress) as bar:
            for target in found:
                prepared = targets[target.run]
                defence = next(d for d in prepared.defences if d.name == target.row.name)
                for source in found:
                    if source is not target:
                        _judge(folder, prepared, defence, target, source, bar)
        matrix = _summed(folder, found)
    _write(matrix)
    return matrix


def parties(runs: Sequence[Path]) -> list[Party]:
    """The defences of the runs, those that several runs repeat once; by their names, or names and runs."""
    rows = [row for row, _ in measurements(runs)]
    names = [row.name for row in rows]
    long = [f"{row.name}, {Path(row.run).name}" for row in rows]
    whole = [f"{row.name}, {row.run}" for row in rows]
    chosen = [
        n if names.count(n) == 1 else m if long.count(m) == 1 else w for n, m, w in zip(names, long, whole, strict=True)
    ]
    return [Party(name, row) for name, row in zip(chosen, rows, strict=True)]


def check_paired(found: Sequence[Party]) -> None:
    """Raise ValueError unless all attacked the same images within the same bound."""
    base = found[0]
    for p in found[1:]:
        same = threat(p.row) == threat(base.row) and _keys(p)["data"] == _keys(base)["data"]
        if not same:
            own, other = (f"{q.row.samples} images of {q.row.dataset}, {stated(*threat(q.row)[1:])}" for q in (p, base))
            raise ValueError(
                f"{p.run} ({own}) and {base.run} ({other}) differ in images or bound; a transfer matrix needs runs of "
                "the same --data, --n-examples, --threat-model and --eps."
            )


def _keys(party: Party) -> dict[str, Any]:
    """What decides which images were attacked, and which draws judge."""
    config, _ = load_manifest(party.run)
    return {"data": config["data"], "seed": config["seed"]}


def rebuild(run: Path, device: str | None) -> Prepared:
    """The models of a run as its ``run.yaml`` says.

    Raises:
        ValueError: there is no such file, or what it says is not what the run was.
    """
    file, (config, _) = run / "run.yaml", load_manifest(run)
    if not file.is_file():
        raise ValueError(f"{run} has no run.yaml, so its defences cannot be built again; make it by `purify attack`.")
    changes: dict[str, Any] = {"out": run, "shard": None, **({} if device is None else {"device": device})}
    prepared = prepare(Evaluation.from_yaml(file).replace(**changes))
    own = json.loads(json.dumps(prepared.config))
    stated = [name for name in ("data", "defences", "code") if name in config]
    other = [found for name in stated for found in differences(config[name], own.get(name), name)]
    if other:
        raise ValueError(f"{run} was made with other models than its run.yaml names today: {', '.join(other[:4])}.")
    return prepared


def _work(found: Sequence[Party], targets: dict[Path, Prepared]) -> float:
    total = 0.0
    for p in found:
        defence = next(d for d in targets[p.run].defences if d.name == p.row.name)
        total += cost(defence) * defence.draws * p.row.samples * (len(found) - 1)
    return total


def _judge(
    folder: RunFolder, prepared: Prepared, defence: Defence, target: Party, source: Party, bar: Progress
) -> None:
    """Store the target's answers to the source's images, batch by batch, as its run judged its own."""
    config, rows_at_once = prepared.config, prepared.request.max_rows
    bar.stage(f"{source.name} on {target.name}")
    for rows in batches(prepared.samples.ids, config["batch_size"]):
        batch = prepared.samples[rows]
        amount = cost(defence) * defence.draws * len(batch)
        if all((target.name, source.name, int(i)) in folder for i in batch.ids):
            bar.skip(amount)
            continue
        with bar.work(defence, amount):
            judged = judge(defence, source.images(batch), batch.ids, config["seed"], rows_at_once)
        for i, sample in enumerate(batch.ids.tolist()):
            if (target.name, source.name, sample) not in folder:
                answers = judged.predictions[i].tolist()
                record = {"defence": target.name, "attack": source.name, "sample": sample}
                folder.append({**record, "label": int(batch.labels[i]), "predictions": answers})


def _summed(folder: RunFolder, found: Sequence[Party]) -> Matrix:
    """The matrix of complete records; of a target's own images from its run's."""
    cells, clean = {}, {}
    for target in found:
        own = target.records(target.row.strongest)
        ids = [r["sample"] for r in own]
        clean[target.name] = _mean(target.records(CLEAN))
        for source in found:
            others = [folder.get(target.name, source.name, i) for i in ids] if source is not target else own
            cells[source.name, target.name] = _mean(others)
    return Matrix(folder.path, tuple(found), cells, clean)


def _mean(records: Sequence[dict[str, Any]]) -> Estimate:
    """Mean accuracy over the draws."""
    predictions, labels = np.array([r["predictions"] for r in records]), np.array([r["label"] for r in records])
    return summarize(predictions, labels)["mean"]


def _write(matrix: Matrix) -> None:
    """transfer.json and transfer.png."""
    row = matrix.parties[0].row
    content = {
        "schema": SCHEMA,
        "dataset": row.dataset,
        "threat": stated(row.threat_model, row.eps),
        "images": row.samples,
        "parties": {
            p.name: {"run": p.run.name, "defence": p.row.name, "attack": p.row.strongest} for p in matrix.parties
        },
        "clean": {name: asdict(found) for name, found in matrix.clean.items()},
        "matrix": {
            s.name: {t.name: asdict(matrix.cells[s.name, t.name]) for t in matrix.parties} for s in matrix.parties
        },
    }
    write_json(matrix.folder / "transfer.json", content)
    draw(matrix, matrix.folder / "transfer.png")


def draw(matrix: Matrix, path: Path) -> None:
    """PNG of the matrix: dark is what the images of a source leave of a target."""
    names, n = [p.name for p in matrix.parties], len(matrix.parties)
    rows = [matrix.clean, *({t: matrix.cells[s, t] for t in names} for s in names)]
    values = np.array([[100 * row[t].value for t in names] for row in rows])
    fig, ax = panels(3.2 + 1.3 * n, 2.2 + 0.7 * n)
    drawn = ax.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for i, row in enumerate(rows):
        for j, name in enumerate(names):
            found, colour = row[name], "white" if values[i, j] < 50 else "black"
            text = f"{values[i, j]:.1f}\n[{100 * found.low:.0f}, {100 * found.high:.0f}]"
            ax.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    ax.set_xticks(range(n), names, rotation=20, ha="right")
    ax.set_yticks(range(n + 1), [CLEAN, *(p.title for p in matrix.parties)])
    ax.set(xlabel="judged on", ylabel="made for (by)")
    fig.colorbar(drawn, label="accuracy, %")
    save(fig, path)
