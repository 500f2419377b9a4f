"""The keys of a config that LAVIS itself reads: ``run``, ``model`` of every model, and a data set's section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Optional

from lavis_cir_plugin.core.settings import (
    Folder,
    Limits,
    NotNegative,
    NotNegativeNumber,
    Positive,
    PositiveNumber,
    Probability,
    Section,
    Share,
    Weights,
)

MOST_SEED = 2**32 - 1
"""Largest seed that NumPy takes."""
Splits = Annotated[tuple[str, ...], Limits(words="a list such as [val]")]
Prompt = Annotated[str, Limits(may_be_empty=True)]


@dataclass(frozen=True)
class RunDefaults:
    """Keys of ``run`` whose defaults this package sets, so that a project need not repeat them.

    Attributes:
        runner: The training loop: ``runner_base`` and ``runner_wrf4cir`` count epochs, ``runner_iter`` and
            ``runner_wrf4cir_iter`` iterations.
        lr_sched: Schedule of the learning rate.
        min_lr: Learning rate at the end, at most ``init_lr``.
        weight_decay: AdamW's weight decay.
        batch_size_eval: Images or queries of a batch in evaluation, per process.
        num_workers: Processes that load data, per process of the run.
        seed: Seed of all generators; a process adds its rank. The order of the data depends on seed plus epoch: seeds
            whose runs shall share no order lie further apart than a run has epochs.
        output_dir: Folder of all runs; each run makes its own sub-folder. All machines of a run must see it.
        amp: Whether to compute in mixed precision, which needs a GPU.
        resume_ckpt_path: Where a training goes on: the folder of a run, a checkpoint, or ``auto`` for the newest
            unfinished run of the same config.
        evaluate: LAVIS's key, which ``python -m lavis.evaluate`` does not need.
        device: Where to compute; one GPU of several is chosen by ``CUDA_VISIBLE_DEVICES``.
        world_size: Number of processes, which the launcher sets from torchrun's environment.
        dist_url: LAVIS's address for processes; the launcher reads torchrun's environment instead.
        train_splits: Splits to train on.
        valid_splits: Splits that are evaluated after each epoch, by name or as ``<data set>.<split>``; ``val`` chooses
            the best checkpoint. Without any, each epoch is saved and the last one is tested.
        test_splits: Splits that are evaluated at the end, with a report. A split that several benchmarks have is
            evaluated on each.
    """

    runner: str = "runner_base"
    lr_sched: str = "linear_warmup_cosine_lr"
    min_lr: NotNegativeNumber = 0
    weight_decay: NotNegativeNumber = 0.05
    batch_size_eval: Positive = 64
    num_workers: NotNegative = 4
    seed: Annotated[int, Limits(ge=0, le=MOST_SEED)] = 42
    output_dir: Folder = "output"
    amp: bool = False
    resume_ckpt_path: Optional[Annotated[str, Limits(words="a checkpoint, a run's folder, auto")]] = None
    evaluate: bool = False
    device: Annotated[
        str,
        Limits(choices=("cuda", "cpu"), words="cuda or cpu (one GPU of several: CUDA_VISIBLE_DEVICES)"),
    ] = "cuda"
    world_size: Positive = 1
    dist_url: str = "env://"
    train_splits: Splits = ()
    valid_splits: Splits = ()
    test_splits: Splits = ()


@dataclass(frozen=True)
class LavisRun(RunDefaults):
    """Keys of ``run`` that LAVIS's runners and tasks read, with LAVIS's own defaults of the others.

    Attributes:
        task: What to train and evaluate.
        init_lr: Learning rate after the warm-up; required to train.
        max_epoch: Number of epochs; required to train by a runner that counts epochs.
        batch_size_train: Triplets, or other samples, of a batch in training, per process; required to train.
        max_iters: Number of batches in all, for the two runners that count iterations. LAVIS trains whole inner
            epochs, so it is rounded up to a multiple of the next key, and the log says so.
        iters_per_inner_epoch: Number of batches between validations of these runners. Wherever a key counts epochs,
            these are meant.
        accum_grad_iters: Batches per optimizer step, at most those of an epoch. LAVIS adds their gradients up, without
            a mean, and those of an incomplete last group to the first step of the next epoch.
        warmup_lr: Learning rate at the start; -1 stands for ``init_lr``.
        warmup_steps: Steps of warm-up, in the first epoch.
        lr_decay_rate: Factor of ``linear_warmup_step_lr`` per epoch.
        beta2: AdamW's decay rate of the second moment.
        log_freq: Batches between lines of the log, and between measurements of a perturbation.
        train_dataset_ratios: LAVIS's key, which must stay null: LAVIS 1.0.2 ends with an error where it reads it.
        distributed: LAVIS's key, which the launcher sets from torchrun's environment.
        use_dist_eval_sampler: Whether processes share an evaluation of LAVIS's own tasks.
        max_len: Largest number of tokens of a generated text.
        min_len: Smallest number of tokens of a generated text.
        num_beams: Beams of the search for a text.
        num_ans_candidates: Number of answers that LAVIS's ``vqa`` ranks.
        inference_method: How LAVIS's ``vqa`` answers: by ranking a list, or by generating.
        prompt: Text before each question of LAVIS's ``vqa``.
        k_test: Number of pairs that LAVIS's ``retrieval`` ranks again.
        report_metric: Whether LAVIS's generating tasks compute their metric.
        load_gt_from_file: Whether LAVIS's captioning takes the ground truth from a file.
    """

    task: str = ""
    init_lr: Optional[PositiveNumber] = None
    max_epoch: Optional[Positive] = None
    batch_size_train: Optional[Positive] = None
    max_iters: Optional[Positive] = None
    iters_per_inner_epoch: Optional[Positive] = None
    accum_grad_iters: Positive = 1
    warmup_lr: Annotated[float, Limits(words="a number >= 0", ge=-1)] = -1
    warmup_steps: NotNegative = 0
    lr_decay_rate: Optional[PositiveNumber] = None
    beta2: Probability = 0.999
    log_freq: Positive = 50
    train_dataset_ratios: Optional[Mapping[str, NotNegativeNumber]] = None
    distributed: bool = False
    use_dist_eval_sampler: bool = True
    max_len: Positive = 10
    min_len: NotNegative = 1
    num_beams: Positive = 3
    num_ans_candidates: Positive = 128
    inference_method: Literal["rank", "generate"] = "rank"
    prompt: Prompt = ""
    k_test: Positive = 128
    report_metric: bool = True
    load_gt_from_file: bool = False


RUN_DEFAULTS: dict[str, Any] = {
    field.name: list(field.default) if isinstance(field.default, tuple) else field.default
    for field in fields(RunDefaults)
}
"""Defaults of ``run`` that are merged into a project."""


@dataclass(frozen=True)
class LavisModel:
    """Keys of ``model`` that every model of this package reads.

    Attributes:
        arch: Name of the model.
        model_type: Type of the model, which has defaults and weights.
        load_finetuned: Whether to load ``finetuned``.
        finetuned: A checkpoint of a run, or of the same model from elsewhere.
        pretrained: Weights that training starts from; ``null`` draws them at random.
        vit_pretrained: Weights of the image tower, read only if ``pretrained`` lacks them.
    """

    arch: str
    model_type: str
    load_finetuned: bool = False
    finetuned: Optional[Weights] = None
    pretrained: Optional[Annotated[str, Limits(words="a path, URL or name")]] = None
    vit_pretrained: Optional[Weights] = None


@dataclass(frozen=True)
class DatasetSection(Section):
    """Keys of ``datasets.<name>`` of the data sets of this package.

    Attributes:
        type: File below ``configs/datasets/<name>/`` with the defaults.
        data_type: LAVIS's key.
        splits: Splits that the run may read of the data set; by default all; ``[]`` turns it off. ``seen`` has training
            queries.
        preload: Whether to keep every preprocessed image in memory, at 12 bytes per pixel.
        build_info: Where the data are, and by which protocol they are read.
        garments: Settings of a drawn world in the data set's files; if it is absent, files are read.
        noise_ratio: Share of the training examples that get a wrong label, from 0 to 1: a triplet another one's target,
            a picture another one's captions, a question another one's answers. Evaluation splits, ``seen`` among them,
            stay right. ``noise.json`` in the run's folder names the wrong ones.
        noise_seed: Seed of that draw. For one seed, the wrong examples of a smaller ratio are among those of a larger.
        vis_processor: Processor of the images, by stage: ``train`` and ``eval``.
        text_processor: Processor of the texts, by stage: ``train`` and ``eval``; null in a stage leaves texts as they
            are.
    """

    type: str = "default"
    data_type: Literal["images"] = "images"
    splits: Optional[Annotated[tuple[str, ...], Limits(words="a list such as [train, val]")]] = None
    preload: bool = False
    build_info: Optional[Mapping[str, Any]] = None
    garments: Optional[Mapping[str, Any]] = None
    noise_ratio: Share = 0
    noise_seed: NotNegative = 0
    vis_processor: Optional[Mapping[str, Any]] = None
    text_processor: Optional[Mapping[str, Any]] = None
