"""When a checkpoint is written, and where a run ends that was asked to.

Every `save_steps` steps and at the end of each stage, or after `save_minutes`; and on a signal, between two steps.
"""

from __future__ import annotations

import time

from gem.checkpoint import states
from gem.checkpoint.folder import continue_command
from gem.errors import Interrupted
from gem.interrupt import Interrupt
from gem.parallel import processes
from gem.run.guards import Guards, remove_needless
from gem.run.keep_best import KEPT
from gem.run.session import RunState, Session, save
from gem.run.stages import STARTING_POLICY, Stage


class SavePoints:
    """Called between two steps and between two stages: the places from which a run can go on."""

    def __init__(self, session: Session, state: RunState, interrupt: Interrupt) -> None:
        self.session, self.state, self.interrupt = session, state, interrupt
        self.last = time.monotonic()

    def after_step(self, stage: Stage, guards: Guards) -> None:
        config, state = self.session.config, self.state
        is_last = state.step == stage.num_steps
        timed, asked = self._asked()
        by_steps = config.save_steps and (is_last or state.total_steps % config.save_steps == 0)
        if timed or asked or by_steps:
            self._save(stage, guards)
        if asked:
            self._end()

    def after_evaluation(self) -> None:
        """Before the next stage. A checkpoint of the last step is enough: the evaluation comes out the same again."""
        if not self._asked()[1]:
            return
        if not (self.session.run_dir / f"checkpoint-{self.state.total_steps}").exists():
            save(self.session, self.state, None, [])
        self._end()

    def _asked(self) -> tuple[bool, bool]:
        """(save_minutes are over, a signal came), the same in every process."""
        minutes = self.session.config.save_minutes
        timed = minutes > 0 and time.monotonic() - self.last >= 60 * minutes
        asked = self.interrupt.signal is not None
        times, signals = processes.sum_over_processes([float(timed and processes.is_main()), float(asked)])
        return times > 0, signals > 0

    def _save(self, stage: Stage, guards: Guards) -> None:
        stage.save_reference()
        needs = [STARTING_POLICY] if stage.reference is not None else []
        if stage.is_objective and self.session.config.keep_best:
            needs.append(KEPT)
        save(self.session, self.state, {**stage.state_dict(), "guards": guards.state_dict()}, needs)
        remove_needless(self.session.run_dir, self.state)
        self.last = time.monotonic()

    def _end(self) -> None:
        processes.wait_for_all()  # the checkpoint is there before a process says so
        run_dir = self.session.run_dir
        last = states.checkpoints(run_dir)[-1].name
        number = self.interrupt.signal or 15  # another process's; how that one ended is its own matter
        raise Interrupted(number, f"; {last} is saved; continue: {continue_command(run_dir)}")
