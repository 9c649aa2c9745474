"""A run on one rank: what it is made of, where it stands, and what it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

from nrt_megatron import stopping
from nrt_megatron.checkpoints import CheckpointMeta, step_of
from nrt_megatron.data import PromptSampler
from nrt_megatron.data.traces import Generator
from nrt_megatron.evals.heldout import Evaluator
from nrt_megatron.mcore import checkpoint, runtime
from nrt_megatron.mcore.generate import MegatronGenerator
from nrt_megatron.mcore.policy import MegatronPolicy
from nrt_megatron.mcore.reduce import StepMetrics, from_main, reduce_max
from nrt_megatron.mcore.rollout_model import rollout_model
from nrt_megatron.mcore.stopwatch import MeasuredGenerator, Stopwatch
from nrt_megatron.output import Output
from nrt_megatron.preflight import Inputs, load_inputs
from nrt_megatron.recipe import ConfigError, Recipe, num_updates_per_step, print_notice, to_yaml
from nrt_megatron.replay import NotFiniteError, keep
from nrt_megatron.report import samples_of
from nrt_megatron.scoring import Scored
from nrt_megatron.timing import StepTimes, peak_memory
from nrt_megatron.watch import Alarm, CollapseError, CollapseWatch, Rollback, rollbacks
from nrt_megatron.weights import fill_weights


class Run:
    """Everything the training loop acts on. Every rank has one; only the main rank writes and speaks."""

    def __init__(self, recipe: Recipe, place: runtime.Runtime, inputs: Inputs, policy: MegatronPolicy):
        self.recipe, self.runtime, self.inputs, self.policy = recipe, place, inputs, policy
        self.directory = Path(recipe.run_dir)
        self.output = Output(recipe, place.is_main)
        self.sampler = PromptSampler(inputs.train, recipe.nrt.seed, recipe.data.shuffle)
        self.marker_ids = inputs.tokenizer.marker_ids
        self.step = 0
        """Steps done."""
        self.last_checkpoint: Optional[Path] = None
        """The newest one, complete unless it is being written; complete when the run ends."""
        self._saver = checkpoint.Saver(self.directory / "checkpoints", recipe.checkpointing)
        self._rollout = StepMetrics()
        tokenizer = inputs.tokenizer
        self.rollout_model, drawing = rollout_model(policy), Stopwatch()
        self.generator = self.rollout_model.for_training(self._generator(self.marker_ids, tokenizer.stop_ids, drawing))
        self.evaluator = Evaluator(
            traces=self._generator(self.marker_ids, tokenizer.stop_ids),
            answers=self._generator((tokenizer.eos_id,), tokenizer.stop_ids),
            tokenizer=tokenizer,
            cfg=recipe.evaluation,
            max_new_tokens=recipe.policy.generation.max_new_tokens,
        )
        held_out = inputs.validation
        self.questions = [] if held_out is None else held_out.take(recipe.evaluation.num_questions)[0]
        self.watch = CollapseWatch(recipe.watch, recipe.nrt.num_generations_per_prompt)
        self._times = StepTimes(recipe.watch, place, policy.forwards, self.rollout_model.place, drawing)

    def _generator(
        self, marker_ids: tuple[int, ...], stop_ids: tuple[int, ...], stopwatch: Optional[Stopwatch] = None
    ) -> Generator:
        made = MegatronGenerator(
            self.rollout_model.place,
            self.rollout_model.chunks,
            self.recipe.policy.generation,
            marker_ids=marker_ids,
            stop_ids=stop_ids,
            vocab_size=self.inputs.shape.vocab_size,
            seed=self.recipe.nrt.seed,
        )
        return self.rollout_model.for_replica(made if stopwatch is None else MeasuredGenerator(made, stopwatch))

    @classmethod
    def start(cls, recipe: Recipe) -> Run:
        """Joins the ranks, builds the policy, and continues from the run's last whole checkpoint if there is one.

        Raises AskedToStop on all ranks when one was asked to stop before they had met.
        """
        place = runtime.initialize(recipe)
        stopping.started()
        if any(reduce_max([float(stopping.asked() is not None)], place.device)):
            runtime.shutdown()
            raise stopping.AskedToStop("asked to stop before the run had started; the same command starts it")
        with place.phase("start"):
            inputs = load_inputs(recipe)
            resume_from = checkpoint.find(Path(recipe.run_dir) / "checkpoints", print_notice)
            updates = recipe.nrt.max_num_steps * num_updates_per_step(recipe)
            policy = MegatronPolicy(place, recipe.policy, inputs.shape, updates)
            if resume_from is None:
                fill_weights(policy, recipe, inputs)
            policy.prepare_for_training()
            run = cls(recipe, place, inputs, policy)
            if resume_from is not None:
                run._continue_from(resume_from)
        return run

    def _continue_from(self, directory: Path) -> None:
        meta = checkpoint.load(directory, self.policy)
        if "watch" in (progress := meta.progress):  # checkpoints of earlier versions have none
            self.watch.load_state_dict(progress["watch"])
        later = from_main(rollbacks.after(self.directory, self.watch.rollbacks))
        if later:  # this checkpoint was gone back to
            self.watch.gone_back(meta.step, later[-1].number)
        self.sampler.load_state_dict(later[-1].sampler if later else progress["sampler"])
        self.policy.skipped_in_a_row = progress["skipped_in_a_row"]
        self.step, self.last_checkpoint = meta.step, directory

    def __enter__(self) -> Run:
        self.output.open(self.last_checkpoint, self._greeting())
        try:
            self._agree()
        except ConfigError:
            self.output.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.output.close()
        if error[0] is None:
            runtime.shutdown()

    def _greeting(self) -> str:
        place, origin = self.runtime, self.last_checkpoint or self.recipe.policy.model.path or "random weights"
        shared = f"CP {place.cp_size} x " if place.cp_size > 1 else ""
        layout = f"TP {place.tp_size} x {shared}PP {place.pp_size} x DP {place.dp_size}"
        if self.rollout_model.moves:
            other = self.rollout_model.place
            layout += f", rollout TP {other.tp_size} x PP {other.pp_size} x DP {other.dp_size}"
        verb = "continuing" if self.step else "starting"
        return f"{verb} from {origin}: {layout}, {self.policy.layers}, {place.device.type}"

    def _agree(self) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether there is a collapse to act on.

        Collective; raises on all ranks when the main one could not write.
        """
        mine = [stopping.asked() is not None, self.output.failure is not None, self.watch.due() is not None]
        stop, failed, collapse = reduce_max([float(each) for each in mine], self.runtime.device)
        if failed:
            self._saver.finish()
            raise self.output.failure or ConfigError("the main rank could not write to run_dir and says why")
        return bool(stop), bool(collapse)

    def goes_on(self) -> bool:
        """Whether another step is to be made: not after the last one, and not when a signal asked to stop.

        After a collapse it goes back first, or raises CollapseError, as the recipe says. Collective: every rank gets
        the same answer, and saves its part when the run ends early.
        """
        stop, collapse = self._agree()
        if collapse and not stop:
            self._recover()
        if stop:
            self._save_once()
        complete = self.step == self.recipe.nrt.max_num_steps
        with self.timed("checkpoint", self.step):
            self._saver.finish() if stop or complete else self._saver.poll()
        return not (stop or complete)

    def _recover(self) -> None:
        """Goes back to the last good checkpoint if that is wanted and can be; else ends the run, unless it is over."""
        self._saver.finish()
        alarm, target = from_main(self.watch.due()), None
        assert alarm is not None, "all ranks see the same"
        if alarm.action == "rollback" and self.watch.rollbacks < self.recipe.watch.max_rollbacks:
            target = checkpoint.find(self.directory / "checkpoints", print_notice, until=self.watch.good or 0)
        if target is not None:
            self._go_back(alarm, target)
        elif self.step < self.recipe.nrt.max_num_steps:
            self._save_once()
            self._saver.finish()
            raise CollapseError.of(alarm, self.recipe.watch, self.step, self.watch.good, self.watch.rollbacks)

    def _go_back(self, alarm: Alarm, target: Path) -> None:
        with self.runtime.phase(f"rollback, step {self.step}"):
            number, sampler = self.watch.rollbacks + 1, self.sampler.state_dict()
            self.output.go_back(Rollback(number, step_of(target), self.step, str(alarm), sampler))
            self._agree()
            self._continue_from(target)

    @property
    def draw(self) -> int:
        """Names the random numbers of the next step: by its number, and after a rollback not as before."""
        return self.step + 1 + (self.watch.rollbacks << 32)

    @contextmanager
    def timed(self, phase: str, step: Optional[int] = None) -> Iterator[None]:
        """Names the phase, by default of the next step, for time-outs, and adds its seconds to the `time/` metrics of
        the row to come."""
        step = self.step + 1 if step is None else step
        with self.runtime.phase(f"{phase}, step {step}"), self._times.measured(phase):
            yield

    def refresh_rollout(self) -> None:
        """Brings the policy's weights to the rollout's layout, where that is another."""
        if self.rollout_model.moves:
            with self.timed("reshard"):
                self.rollout_model.refresh()

    def note(self, scored: Scored) -> None:
        """Takes in what the rollout showed, and writes samples when they are due."""
        generated, logger = scored.rollout.generated, self.recipe.logger
        self._rollout = StepMetrics(dict(scored.metrics), dict(scored.maxima))
        self._rollout.tokens |= {"rollout": generated.num_sampled_tokens, "scoring": generated.num_scored_tokens}
        self._times.scored_within_rollout(generated.scoring_seconds)
        step = self.step + 1
        due = logger.samples_every and (step == 1 or step % logger.samples_every == 0)
        with self.output.writing() as writes:
            if writes and due:
                samples = samples_of(scored, self.inputs.tokenizer, step, logger.samples_num_prompts)
                self.output.write_samples(samples)

    @contextmanager
    def replayable(self) -> Iterator[None]:
        """Saves the batch and the weights of an update with which the run has to end, for `nrt replay`."""
        try:
            yield
        except NotFiniteError as failure:
            self._saver.finish()
            meta, limit = self._meta("replay"), self.recipe.nrt.max_skipped_updates
            raise keep(failure, self.directory, self.policy, meta, self._documents(), limit) from None

    def finish_step(self, metrics: StepMetrics) -> None:
        """Counts the step; evaluates, writes its row and saves a checkpoint, each if due."""
        self.step += 1
        cfg = self.recipe
        metrics.add(self._rollout.sums, self._rollout.maxima)
        metrics.tokens |= self._rollout.tokens
        times, slow = self._times.take()
        metrics.values |= times
        metrics.values |= {f"data/dropped_{reason}": count for reason, count in self.sampler.dropped.items()}
        metrics.maxima["memory/peak_bytes"] = peak_memory()
        self._rollout = StepMetrics()
        last = self.step == cfg.nrt.max_num_steps
        row = metrics.reduce(self.runtime)
        watched, signs = self.watch.judge(self.step, row)
        row |= watched
        if last or (cfg.evaluation.every and self.step % cfg.evaluation.every == 0):
            row |= self._evaluate()
        self._write(row)
        self.output.say(*slow, *signs)
        if last or self.step % cfg.checkpointing.every == 0:
            self.save()

    def evaluate(self) -> None:
        """Evaluates before the first step, in a row of its own."""
        self._write(self._evaluate())

    def _evaluate(self) -> dict[str, float]:
        if not self.questions:
            return {}
        self.refresh_rollout()
        place = self.rollout_model.place
        with self.runtime.phase(f"evaluation, step {self.step}"):
            share = self.questions[place.dp_rank :: place.dp_size]
            return StepMetrics(self.evaluator.run(share)).reduce(place)

    def _write(self, row: dict[str, float]) -> None:
        if row:
            self.output.write_row({"step": self.step, **row})

    def save(self) -> None:
        """Writes, or begins to write, a checkpoint of the current step. Raises StorageError when the disk does not
        take it, or did not take the one before."""
        with self.timed("checkpoint", self.step):
            self.output.say(*self.watch.saving(self.step))
            self._saver.spared = self.watch.spared
            self.last_checkpoint = self._saver.save(self.policy, self._meta("train"), self._documents())

    def _save_once(self) -> None:
        """As `save`, unless this step, or no step at all, is what the last checkpoint holds."""
        if self.step and (self.last_checkpoint is None or step_of(self.last_checkpoint) != self.step):
            self.save()

    def _meta(self, kind: str) -> CheckpointMeta:
        progress = {
            "sampler": self.sampler.state_dict(),
            "skipped_in_a_row": self.policy.skipped_in_a_row,
            "watch": self.watch.state_dict(),
            "bf16": self.recipe.policy.megatron_cfg.bf16,
        }
        return CheckpointMeta(self.step, self.runtime.world_size, self.inputs.shape.to_hf(), kind, progress)

    def _documents(self) -> Callable[[Path], None]:
        """Writes what makes a checkpoint readable by itself: recipe and tokenizer."""

        def write(target: Path) -> None:
            self.inputs.tokenizer.save(target / "tokenizer")
            (target / "recipe.yaml").write_text(to_yaml(self.recipe))

        return write

    def finish(self) -> bool:
        """Shows the summary of the whole run, or where it was left; returns whether it is complete."""
        self.output.conclude(self.step, self.last_checkpoint)
        return self.step == self.recipe.nrt.max_num_steps
