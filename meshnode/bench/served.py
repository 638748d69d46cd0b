"""What is served beside what was trained: labels of the int4 layers with an adapter, and of torch in float32 with it.

The adapters are those that `bench factors --dir` keeps, judged on the held-out samples of their task. A label's score
is the logit of its first token, on both sides. Torch runs in the trainer's process, the layers in an engine here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio

from meshnode.bench.lessons import TRIALS, frame_for
from meshnode.bench.machine import machine
from meshnode.bench.single import stage_spec
from meshnode.core.errors import ModelError
from meshnode.engine.onnx_stage import OnnxStage
from meshnode.engine.requests import load_request
from meshnode.engine.sessions import Sessions
from meshnode.harness.baselines import model_files, samples_of
from meshnode.model.adapter import layer_files
from meshnode.trainer.port import EvaluateJob, Evaluation, Sample
from meshnode.trainer.process import TrainerProcess
from meshnode.trainer.texts import Texts
from protocols.delta.frame import BOTH, Frame, Vector
from protocols.enginewire.messages import Adapt

Json = dict[str, Any]
_NAME: Final = "bench"


def measure(
    published: Path, variants: Sequence[str], task: str, seed: int, folder: Path, say: Callable[[str], None]
) -> Json:
    """How often both sides say the same, and how often each is right. Blocking.

    Args:
      published: a folder that the publisher wrote, with `train` and `variants`.
      folder: of `bench factors --dir`.

    Raises ModelError when that has no adapter of this task and seed.
    """
    made = folder / f"{task}-{seed}"
    try:
        vector: Vector = np.load(made / f"{BOTH}.npy")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{made} holds no adapter ({error}). Make it: meshnode bench factors --task {task} --first-seed {seed} "
            f"--seeds 1 --dir {folder}"
        ) from error
    frame, samples = frame_for(published, TRIALS[task].targets, seed), samples_of(made / "heldout.jsonl")
    theirs = trio.run(_judged, published, frame, vector, samples, made / "hidden-float32")
    say(f"torch, float32: {theirs.accuracy:.1%}")
    truth = np.array([theirs.labels.index(sample.label) for sample in samples])
    said = theirs.scores.argmax(axis=1)
    found: Json = {}
    for variant in variants:
        ours = _served(published, variant, frame, vector, samples, theirs.labels)
        found[variant] = {
            "accuracy": round(float((ours == truth).mean()), 4),
            "agreement": round(float((ours == said).mean()), 4),
        }
        say(f"{variant}: {found[variant]['accuracy']:.1%}, as torch says in {found[variant]['agreement']:.1%}")
    return {
        "task": task,
        "seed": seed,
        "samples": len(samples),
        "torch": round(theirs.accuracy, 4),
        **found,
        "machine": machine(),
    }


async def _judged(
    published: Path, frame: Frame, vector: Vector, samples: Sequence[Sample], cache: Path
) -> Evaluation:
    trainer = TrainerProcess()
    try:
        job = EvaluateJob(
            model=model_files(published, frame.base),
            frame=frame,
            adapters=(vector,),
            samples=tuple(samples),
            cache=cache,
            compute="float32",
        )
        (found,) = await trainer.evaluate(job)
    finally:
        await trainer.aclose()
    return found


def _served(
    published: Path, variant: str, frame: Frame, vector: Vector, samples: Sequence[Sample], labels: Sequence[str]
) -> np.ndarray[Any, Any]:
    """The number of the label that the layers of a variant give to each sample."""
    spec = stage_spec(published, variant)
    stage = OnnxStage(load_request(spec))
    adapters = Sessions(stage, load_request(spec)).adapters
    targets = tuple(target.name for target in frame.targets)
    adapters.announce(
        Adapt(
            number=0,
            adapter=_NAME,
            first=frame.first,
            last=frame.last,
            rank=frame.rank,
            alpha=frame.alpha,
            targets=targets,
        )
    )
    for layer, content in layer_files(frame, vector):
        adapters.fill(_NAME, layer, content)
    used = adapters.of(_NAME, 0, spec.last)
    assert used is not None
    texts = Texts(published / "tokenizer.json")
    out = []
    for sample in samples:
        row = texts.row(sample)
        ids = np.asarray(row.ids[: row.first + 1], np.int32)  # the input alone
        track = stage.open(0, spec.last, len(ids), used.factors)
        logits = track.run(0, ids, prefill=True, wanted=True)
        firsts = [texts.answer(sample.input, label)[0] for label in labels]
        out.append(int(np.argmax(logits[firsts])))
    return np.array(out)
