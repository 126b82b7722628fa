"""Measures training inside the process of a contender, whatever command started it.

`sitecustomize.py` loads it at the start of Python. It waits until the process imports transformers'
Trainer, and then counts and times the steps of the trainer that is made. The command itself is the
one that a user would type. Only the standard library is used: it must run in every environment.
Results go to `probe-<rank>.json` in the folder that `TRAINING_PROBE_DIR` names.
"""

import os
import sys
import time

_FOLDER = "TRAINING_PROBE_DIR"
_START = "TRAINING_PROBE_START"  # of the command, by the monotonic clock all processes share
_IGNORED_LABEL = -100
_LIBRARIES = (
    *("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed"),
    *("llamafactory", "trl", "llmtuner"),
)


def wait_for_trainer():
    """Watch the Trainer as soon as the process imports it."""
    sys.meta_path.insert(0, TrainerFinder)


class TrainerFinder:
    """Finds `transformers.trainer` as usual, and has its Trainer watched once it is there."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Return the ordinary spec with a loader that also calls `watch`."""
        if name != "transformers.trainer":
            return None
        from importlib.machinery import PathFinder

        sys.meta_path.remove(cls)
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_and_watch(module):
            execute(module)
            watch(module.Trainer, sys.modules["transformers"].TrainerCallback)

        spec.loader.exec_module = execute_and_watch
        return spec


def watch(trainer_class, callback_class):
    """Have every trainer of the process record its steps."""
    import functools

    create = trainer_class.__init__

    @functools.wraps(create)
    def create_and_attach(self, *args, **kwargs):
        create(self, *args, **kwargs)
        attach(self, callback_class)

    trainer_class.__init__ = create_and_attach


def attach(trainer, callback_class):
    """Count the batches and time the steps of one trainer."""
    record = Record(float(os.environ[_START]))
    step = trainer.training_step

    def counted_step(model, inputs, *args, **kwargs):
        record.count(inputs)
        loss = step(model, inputs, *args, **kwargs)
        record.loss += float(loss.detach())
        return loss

    class Clock(callback_class):
        def on_train_begin(self, args, state, control, **kwargs):
            record.begin()

        def on_step_end(self, args, state, control, **kwargs):
            record.end_step()

        def on_train_end(self, args, state, control, **kwargs):
            record.write()

    trainer.training_step = counted_step
    trainer.add_callback(Clock())
    import atexit

    atexit.register(record.write)  # again: saving can be the peak of memory


class Record:
    """The steps of one process, in seconds and tokens."""

    def __init__(self, start):
        """Begin empty; `start` is when the command was started."""
        self.start = start
        self.begin_s = None
        self.last = self.last_cpu = None
        self.steps = []
        self.reset()

    def reset(self):
        """Forget the counts of the current step."""
        self.counts = dict.fromkeys(("tokens", "slots", "supervised", "samples"), 0)
        self.loss = 0.0

    def begin(self):
        """Note that everything is loaded and the first batch is about to be read."""
        self.last, self.last_cpu = time.monotonic(), time.process_time()
        self.begin_s = self.last - self.start

    def count(self, batch):
        """Add a micro-batch to the current step."""
        for name, value in count(batch).items():
            self.counts[name] += value

    def end_step(self):
        """Close an optimizer step; it began where the one before ended."""
        now, cpu = time.monotonic(), time.process_time()
        times = {"seconds": now - self.last, "cpu_seconds": cpu - self.last_cpu}
        self.steps.append({**times, "loss": self.loss, **self.counts})
        self.last, self.last_cpu = now, cpu
        self.reset()

    def write(self):
        """Write what is known so far."""
        import json

        rank = os.environ.get("RANK", "0")
        values = {
            "begin_s": self.begin_s,
            "first_step_s": self.begin_s + self.steps[0]["seconds"] if self.steps else None,
            "steps": self.steps,
            "peak_bytes": peak_bytes(),
            "versions": versions(),
        }
        with open(os.path.join(os.environ[_FOLDER], f"probe-{rank}.json"), "w") as file:
            json.dump(values, file)


def count(batch):
    """Return the places, real tokens, trained tokens and samples of a micro-batch.

    A sample is one stretch of trained tokens: each row of the data has one answer.
    """
    slots = batch["input_ids"].numel()
    if "targets" in batch:  # only places with a label are kept
        supervised = batch["targets"].numel()
    else:
        is_trained = batch["labels"] != _IGNORED_LABEL
        supervised = int(is_trained[..., 1:].sum())
    mask = batch.get("attention_mask")
    if mask is None:
        tokens = slots
    elif mask.dim() == 4:  # a place that is no padding sees itself
        itself = mask.diagonal(dim1=-2, dim2=-1)
        tokens = int((itself if itself.dtype.is_floating_point is False else itself == 0).sum())
    else:
        tokens = int((mask > 0).sum())
    if "cu_seq_lens_q" in batch:
        samples = batch["cu_seq_lens_q"].numel() - 1
    elif "labels" in batch:
        samples = int((is_trained[..., 1:] & ~is_trained[..., :-1]).sum())
    else:
        samples = len(batch["input_ids"])
    return {"tokens": tokens, "slots": slots, "supervised": supervised, "samples": samples}


def peak_bytes():
    """Return the largest resident memory of this process so far, by the kernel's count."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def versions():
    """Return the versions of the libraries that are installed."""
    from importlib import metadata

    found = {"python": sys.version.split()[0]}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
