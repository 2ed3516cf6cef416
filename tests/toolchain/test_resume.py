import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.toolchain.methods.doubles import TinyBatches, same, student, tiny_run, weights
from tests.toolchain.train_doubles import Dying, Generations, Killed, lines, train
from toolchain import checkpoint
from toolchain.methods.plain import Plain


@pytest.mark.parametrize("make", [Plain, Generations])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_killed_anywhere_it_ends_with_the_same_bits(tmp_path, make, accumulate):
    settings = {"select": "best", "accumulate": accumulate}
    whole = tiny_run(tmp_path / "whole", train=settings)
    expected = weights(train(whole, make)[0])
    for after in (0, 1, 2, 3, 5):
        with pytest.raises(Killed):
            train(tiny_run(tmp_path / "killed", train=settings), make, Dying(after))
    killed = tiny_run(tmp_path / "killed", train=settings)
    assert same(expected, weights(train(killed, make)[0]))
    assert lines(whole) == lines(killed)


def test_a_process_killed_by_sigkill_resumes(tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from tests.toolchain.methods.doubles import *
        from toolchain.methods.plain import Plain
        class Killing(TinyBatches):
            def pick(self, index, epoch):
                if self.fetched == 6:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().pick(index, epoch)
        run = tiny_run(Path(sys.argv[1]), batches=Killing())
        run.stage("student", Plain(student()), run.batches(), run.cfg.train, run.scorer())
    """)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "killed")], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / "killed" / "student").glob("*.safetensors"))
    found, expected = train(tiny_run(tmp_path / "killed"))[0], train(tiny_run(tmp_path / "whole"))[0]
    assert same(weights(expected), weights(found))


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_ctrl_c_saves_and_propagates(tmp_path, signals):
    class Interrupting(TinyBatches):
        def pick(self, index, epoch):
            if self.fetched == 5:
                for number in signals:
                    signal.raise_signal(number)
            return super().pick(index, epoch)

    settings = {"checkpoint_seconds": 1000}
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run(tmp_path / "a", train=settings), batches=Interrupting())
    assert signal.getsignal(signal.SIGINT) is handler
    entry = next(iter(checkpoint.read(tmp_path / "a" / "student")))
    assert entry.state["step"] == 6
    found, expected = train(tiny_run(tmp_path / "a")), train(tiny_run(tmp_path / "b"))
    assert same(weights(expected[1]), weights(found[1]))


@pytest.mark.parametrize(("cost", "apart"), [(0.0, 2), (0.25, 10), (100.0, 20)])
def test_slow_checkpoints_are_saved_less_often_but_not_ten_times_less(tmp_path, monkeypatch, cost, apart):
    """A step takes 0.5 s, a checkpoint is due every second; five seconds are waited for one of 0.25 s."""
    clock, saved, save = [0.0], [], checkpoint.save

    class Ticking(TinyBatches):
        def pick(self, index, epoch):
            clock[0] += 0.5
            return super().pick(index, epoch)

    def slow(folder, step, *contents):
        saved.append(step)
        clock[0] += cost
        return save(folder, step, *contents)

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr("toolchain.loop.time.monotonic", lambda: clock[0])
    train(tiny_run(tmp_path, train={"checkpoint_seconds": 1, "epochs": 20}), batches=Ticking())
    assert saved[:3] == [2, 2 + apart, 2 + 2 * apart]


def test_a_damaged_checkpoint_gives_way_to_the_older_one_then_to_a_new_start(tmp_path, capsys):
    expected = weights(train(tiny_run(tmp_path / "whole"))[0])
    for bad in (1, 2):
        run = tiny_run(tmp_path / f"bad{bad}")
        run.quiet = False
        with pytest.raises(Killed):
            train(run, batches=Dying(7))
        files = sorted((run.work / "student").glob("*.safetensors"), reverse=True)
        assert [file.stem for file in files] == ["checkpoint-000000007", "checkpoint-000000006"]
        for file in files[:bad]:
            content = bytearray(file.read_bytes())
            content[-5] ^= 1
            file.write_bytes(content)
        assert same(expected, weights(train(run)[0]))
        said = capsys.readouterr().err
        assert "is damaged" in said
        assert ("resumed at step 6" in said) == (bad == 1)


def test_a_checkpoint_of_another_start_is_not_used(tmp_path, capsys):
    run = tiny_run(tmp_path)
    run.quiet = False
    with pytest.raises(Killed):
        train(run, batches=Dying(7))
    changed = train(run, lr=0.02)[0]
    assert "of another config or start; not used" in capsys.readouterr().err
    assert same(weights(changed), weights(train(tiny_run(tmp_path / "b"), lr=0.02)[0]))


def test_finished_stages_are_not_repeated(tmp_path):
    def two_stages(run, first, second):
        start, final = Plain(student(1)), Plain(student(2))
        run.stage("first", start, first, run.cfg.train, run.scorer())
        return start, run.stage("second", final, second, run.cfg.train, run.scorer())

    expected = two_stages(tiny_run(tmp_path / "whole"), TinyBatches(), TinyBatches())
    with pytest.raises(Killed):
        two_stages(tiny_run(tmp_path / "killed"), TinyBatches(), Dying(6))
    never, resumed = Dying(0), TinyBatches()
    run = tiny_run(tmp_path / "killed")
    found = two_stages(run, never, resumed)
    assert [same(weights(a), weights(b)) for a, b in zip(expected, found, strict=True)] == [True, True]
    assert resumed.fetched == 3 * 4 - 6
    assert [record["name"] for record in run.records] == ["first", "second"]
    assert {line["stage"] for line in lines(run)} == {"first", "second"}


def test_a_damaged_finished_stage_is_trained_again(tmp_path, capsys):
    run = tiny_run(tmp_path)
    expected = weights(train(run)[0])
    (tmp_path / "stages" / "student" / "model.safetensors").write_bytes(b"gone")
    run.quiet = False
    assert same(expected, weights(train(run)[0]))
    assert "cannot be used, training anew" in capsys.readouterr().err


def test_checkpoints_are_tensors_and_json_two_kept_leftovers_removed(tmp_path):
    (tmp_path / ".checkpoint-000000001.safetensors.99.tmp").write_bytes(b"killed")
    tied = torch.ones(2)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"a": tied, "b": tied}, {"step": step})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"checkpoint-{step:09d}.{kind}" for step in (2, 3) for kind in ("json", "safetensors")]
    (tmp_path / "checkpoint-000000003.json").write_text('{"state": {}}')
    broken, good = checkpoint.read(tmp_path)
    assert "is damaged" in broken
    assert good.state == {"step": 2}
    assert torch.equal(good.tensors["b"], tied)


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys", ["", "train_prototypes='ema'", "preset='assignment'", "preset='assignment', train_prototypes='ema'"]
)
def test_two_processes_resume_to_the_same_bits(tmp_path, keys):
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent("""
            import sys
            from pathlib import Path
            from accelerate import PartialState
            state = PartialState(cpu=True)
            from safetensors.torch import save_file
            from tests.toolchain.methods.doubles import *
            from toolchain.methods import prockd
            from toolchain.methods.options import ProCKD
            class Dying(TinyBatches):
                def pick(self, index, epoch):
                    if self.fetched == int(sys.argv[2]):
                        raise RuntimeError("killed")
                    return super().pick(index, epoch)
            run = tiny_run(Path(sys.argv[1]), method=ProCKD(name="prockd", K=5, KEYS), batches=Dying())
            student = prockd.distill(run.cfg, run)
            if state.is_main_process:
                save_file(student.state_dict(), sys.argv[1] + ".safetensors")
        """).replace(", KEYS", f", {keys}" if keys else "")
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    codes = [
        subprocess.run([*launch, str(tmp_path / name), after], cwd=root, env=environment, check=False).returncode
        for name, after in (("whole", "-1"), ("killed", "7"), ("killed", "-1"))
    ]
    assert [code == 0 for code in codes] == [True, False, True]
    whole, killed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())
