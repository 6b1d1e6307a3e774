# SPDX-License-Identifier: Apache-2.0
"""What is written is what is read; what cannot be read says so."""

import math
from functools import partial

import pytest
import torch

from lightning_sgdclean.base.errors import RunDirectoryError
from lightning_sgdclean.data.unpacking import unpack_batch
from lightning_sgdclean.trajectory.joining import CheckpointMark, cut_off
from lightning_sgdclean.trajectory.store import Trajectory
from lightning_sgdclean.trajectory.writer import TrajectoryWriter
from small_steps import state, step


def written(folder, interval=1, close=True):
    writer = TrajectoryWriter(folder, interval)
    writer.begin(state(0.0, False))
    for index in range(4):
        writer.append(step(index, index // 2, index % 2 == 1), partial(state, float(index + 1), True))
    if close:
        writer.close()
    return writer


def dropped(writer, epoch):
    writer.keep_only((epoch, math.inf))
    writer.flush()


def test_states_and_steps_come_back_as_they_went(tmp_path):
    written(tmp_path)
    trajectory = Trajectory(tmp_path)
    assert [s.index for s in trajectory.steps] == [0, 1, 2, 3]
    assert trajectory.state(0).optimizer == {}
    for index in range(1, 5):
        assert torch.equal(trajectory.state(index).params["a"], torch.full((2, 3), float(index)))
        assert torch.equal(trajectory.state(index).optimizer["a"]["momentum_buffer"], torch.full((2, 3), -float(index)))
        assert trajectory.state(index).buffers["count"].item() == index
    assert trajectory.steps[1].clip == ("norm", 0.5)
    kept = unpack_batch(trajectory.batch(trajectory.steps[1], 0), {}, torch.device("cpu"))
    assert kept["meta"] == ["p", (1, None)]
    assert torch.equal(kept["x"], torch.ones(2))
    assert [s.micro[0].digest.tolist() for s in trajectory.steps] == [[0, 0], [1, -1], [2, -2], [3, -3]]
    assert [float(s.micro[0].loss) for s in trajectory.steps] == [float(torch.tensor(0.1))] * 4
    assert trajectory.random(trajectory.steps[3], 0)["torch"].equal(torch.get_rng_state())


def test_only_snapshots_and_the_last_state_are_kept(tmp_path):
    written(tmp_path, interval=3)
    trajectory = Trajectory(tmp_path)
    assert trajectory.kept == [0, 3, 4]
    assert [s.index for s in trajectory.steps] == [0, 1, 2, 3]
    assert torch.equal(trajectory.state(3).params["b"], torch.tensor(3.0))
    with pytest.raises(RunDirectoryError, match="no state before step 2"):
        trajectory.state(2)


def test_what_was_written_before_a_crash_is_read(tmp_path):
    writer = written(tmp_path, close=False)
    writer.flush()
    trajectory = Trajectory(tmp_path)
    assert [s.index for s in trajectory.steps] == [0, 1, 2, 3]
    assert trajectory.kept == [0, 1, 2, 3]  # the state after the last step is in memory only


def test_last_state_gets_a_segment_of_its_own_where_all_steps_were_written(tmp_path):
    writer = written(tmp_path, close=False)
    writer.flush()
    writer.close()
    trajectory = Trajectory(tmp_path)
    assert trajectory.kept == [0, 1, 2, 3, 4]
    assert torch.equal(trajectory.state(4).params["b"], torch.tensor(4.0))
    dropped(writer, 1)
    assert Trajectory(tmp_path).kept == [0, 1, 2]  # positions: the first two steps are gone


def test_dropped_epochs_leave_the_snapshot_that_later_ones_are_recomputed_from(tmp_path):
    dropped(written(tmp_path / "three", interval=3), 1)
    assert Trajectory(tmp_path / "three").kept == [0, 3, 4]
    dropped(written(tmp_path / "two", interval=2), 1)
    assert Trajectory(tmp_path / "two").kept == [0, 2]


def test_steps_with_gaps_between_their_numbers_have_their_states(tmp_path):
    writer = TrajectoryWriter(tmp_path)
    writer.begin(state(0.0, False))
    for value, index in enumerate((3, 5, 9)):
        writer.append(step(index, 0, False), partial(state, float(value + 1), True), is_last=index == 9)
    writer.close()
    trajectory = Trajectory(tmp_path)
    assert trajectory.kept == [0, 1, 2, 3]
    for value, index in enumerate((3, 5, 9, 10)):
        assert torch.equal(trajectory.state(index).params["b"], torch.tensor(float(value)))
    assert torch.equal(trajectory.state(4).params["b"], torch.tensor(1.0))  # after step 3, that is


def in_epochs(writer, indices, two_windows=None):
    """Epochs of two steps, the state before step ``i`` holding ``i``."""
    for index in indices:
        writer.append(step(index, index // 2, index % 2 == 1), partial(state, float(index + 1), True))
    if two_windows is not None:
        writer.keep_only(*two_windows)


def test_between_two_windows_steps_can_go_and_each_has_its_own_states(tmp_path):
    writer = TrajectoryWriter(tmp_path)
    writer.keeps_epochs = True
    writer.begin(state(0.0, False))
    in_epochs(writer, range(10), [(1, 4), (4, math.inf)])
    writer.flush()
    first, last = Trajectory(tmp_path, 4), Trajectory(tmp_path)
    assert [s.index for s in first.steps] == [2, 3, 4, 5]  # with the segment that the state at the end lies in
    assert [s.index for s in last.steps] == [8, 9]
    for trajectory, indices in ((first, range(2, 6)), (last, range(8, 10))):
        for index in indices:
            assert trajectory.state(index).params["b"].item() == index
    with pytest.raises(RunDirectoryError, match="no state before step 6"):
        first.state(6)  # which would stand where step 8 does, were the two read as one
    with pytest.raises(RunDirectoryError, match="keeps no steps from 6 on that lead to step 7"):
        Trajectory(tmp_path, 7)


@pytest.mark.parametrize(("step", "kept"), [(7, [2, 3, 4, 5]), (9, [8])])
def test_a_fit_that_goes_on_from_a_step_that_was_let_go_begins_a_stretch_of_its_own(tmp_path, step, kept):
    writer = TrajectoryWriter(tmp_path)
    writer.keeps_epochs = True
    writer.begin(state(0.0, False))
    in_epochs(writer, range(10), [(1, 4), (4, math.inf)])
    writer.flush()
    cut_off(tmp_path, CheckpointMark(writer.run, step, str(tmp_path), True, writer.fit))
    assert [s.index for s in Trajectory(tmp_path).steps] == kept
    writer = TrajectoryWriter(tmp_path)
    writer.begin(state(float(step), True))
    in_epochs(writer, range(step, 12))
    writer.close()
    last = Trajectory(tmp_path)
    assert [s.index for s in last.steps] == [*(kept if step == 9 else []), *range(step, 12)]
    assert all(last.state(s.index).params["b"].item() == s.index for s in last.steps)
    assert last.state(12).params["b"].item() == 12
    first = Trajectory(tmp_path, 4)
    assert [s.index for s in first.steps] == [2, 3, 4, 5]
    assert first.state(4).params["b"].item() == 4


def test_dropped_epochs_go_and_the_first_kept_step_still_has_its_state(tmp_path):
    writer = written(tmp_path)
    dropped(writer, 1)
    trajectory = Trajectory(tmp_path)
    assert [s.index for s in trajectory.steps] == [2, 3]
    assert torch.equal(trajectory.state(2).params["b"], torch.tensor(2.0))
    assert len(list(tmp_path.glob("segment-*"))) == 1


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_ctrl_c_while_a_state_is_copied_leaves_what_was_there(tmp_path, interval):
    """The state that lies before the step stays what it is; none is made up for the one after it."""

    def interrupted():
        raise KeyboardInterrupt

    writer = TrajectoryWriter(tmp_path, interval)
    writer.begin(state(0.0, False))
    for index in range(3):
        writer.append(step(index, 0, index == 2), partial(state, float(index + 1), True))
    with pytest.raises(KeyboardInterrupt):
        writer.append(step(3, 1, True), interrupted)
    writer.close()
    trajectory = Trajectory(tmp_path)
    assert [s.index for s in trajectory.steps] == [0, 1, 2, 3]
    assert trajectory.kept == [index for index in range(4) if index % interval == 0]
    for index in trajectory.kept:
        assert torch.equal(trajectory.state(index).params["b"], torch.tensor(float(index)))
