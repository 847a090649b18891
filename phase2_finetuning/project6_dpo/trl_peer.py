"""The peer of benchmark.py: trl's DPOTrainer, in a process of its own, as trl has requirements of its own.

benchmark.py starts it (`uv run --with trl`) with a folder that holds a model, a reference and job.json. It answers on
standard output, one line of JSON behind an "@" at a time: first the losses that trl computes, then the time of each
round of optimizer steps, for which it waits for a line on standard input.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace


def main(argv=None):
    """Compute the losses, then take the steps, a round for every line that comes in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=".", help="where model/, reference/ and job.json lie")
    folder = Path(parser.parse_args(argv).folder)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    say({"version": version(), "losses": losses(folder, job), "formulas": formulas(job)})
    take_steps(folder, job)


def say(values):
    """One line for the benchmark."""
    print("@" + json.dumps(values), flush=True)


def version():
    """trl's version."""
    import trl

    return trl.__version__


def build_trainer(folder, job, reference=None, **changes):
    """trl's trainer in float32, with the settings that our step has."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    load = lambda name: AutoModelForCausalLM.from_pretrained(folder / name, dtype="float32")  # noqa: E731
    options = {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": job["pairs_a_step"], "beta": job["beta"],
        "learning_rate": 1e-5, "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "max_length": None,
        "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return DPOTrainer(
        load("model"), ref_model=load(reference) if reference else None, args=DPOConfig(**options | changes),
        train_dataset=Dataset.from_list(job["pairs"]), processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip


def losses(folder, job):
    """What trl's DPO and IPO cost on the first pairs: a mean over them each."""
    import torch

    trainer = build_trainer(folder, job, "reference")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(job["pairs_a_step"])])
    found = {}
    for name in ("sigmoid", "ipo"):
        trainer.loss_types = [name]
        with torch.no_grad():
            found[name] = float(trainer._compute_loss(trainer.model.eval(), batch, return_outputs=False))
    return found


def formulas(job):
    """trl's SimPO and the odds ratio of its ORPO, of given mean log-probabilities."""
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = torch.tensor(job["means"]).T
    cpu = SimpleNamespace(device="cpu")
    cpo = SimpleNamespace(alpha=0.0, loss_type="simpo", simpo_gamma=0.5, beta=2.0, label_smoothing=0.0, accelerator=cpu)
    simpo = CPOTrainer.cpo_loss(cpo, chosen, rejected)[0]
    odds = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=1.0, accelerator=cpu), chosen, rejected)[0]
    return {"simpo": simpo.tolist(), "odds": odds.tolist()}


def take_steps(folder, job):
    """Train, but begin each round of steps only when a line has come in, and say when it is over."""
    from transformers import TrainerCallback

    class _Rounds(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % job["steps"] == 0:
                sys.stdin.readline()
                self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % job["steps"] == 0:
                say({"seconds": time.perf_counter() - self.began})

    trainer = build_trainer(folder, job, precompute_ref_log_probs=True, max_steps=job["steps"] * job["rounds"])
    trainer.add_callback(_Rounds())
    trainer.train()


if __name__ == "__main__":
    main()
