"""The whole recipe as dataclasses: every field with its meaning, its unit and, where it has one, its source.

This file imports nothing but the standard library, so a recipe can be read, checked and planned without torch.
`None` where a field allows it means "not set": what then happens stands beside the field. Defaults here are neutral;
`recipes/base.yaml` is what every shipped recipe extends.

Durations are strings with a unit: "32 epochs", "2000 steps", "12.8e9 samples" (see `recipe/durations.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Run:
    name: str = "run"
    """Name of the run; its folder is `folder/name`."""
    folder: str = "runs"
    """Where run folders live."""
    seed: int = 0
    """Seed of the initial weights and of every random decision about samples (ops/random.py)."""
    overwrite: bool = False
    """Delete an existing run folder of this name and start over; otherwise a second start resumes."""
    duration: str | None = None
    """How long to train, e.g. "32 epochs". Exactly one of this and `phases` is set."""
    log_every: str = "10 steps"
    """How often a row goes to metrics.jsonl, TensorBoard and the console."""
    checkpoint_every: str = "500 steps"
    """How often a checkpoint is written; one is always written at the end and on SIGTERM or SIGINT."""
    keep_checkpoints: int = 3
    """The newest so many checkpoints are kept, whatever their age. At least 1."""
    keep_checkpoints_hours: float = 0.0
    """Checkpoints younger than this many hours are kept too; the rest is deleted."""
    copy_checkpoints_to: str | None = None
    """A second folder, on another disk, that gets a copy of every checkpoint; a start falls back to it."""
    timings: bool = False
    """Write where the time of every step goes, per rank, into timings/ of the run folder (tools/scaling.py reads it):
    on a GPU two events per collective, on a CPU next to nothing."""
    stop_after: str | None = None
    """End cleanly, with a checkpoint, when the run has come this far; the schedule still aims at `duration`."""


@dataclass
class Source:
    urls: list[str] = field(default_factory=list)
    """Shards: paths or URLs with brace expansion, e.g. "data/cc12m/{00000..01242}.tar"; paths may hold the wildcards
    * and ? too. URLs: http:, https:, s3:, gs:, or "pipe:COMMAND" (see allow_pipe)."""
    weight: float = 1.0
    """Relative share of the slots of a batch that this source fills. Above 0."""


@dataclass
class Tokenizer:
    kind: str = "sentencepiece"
    """"sentencepiece" (a .model file) or "clip_bpe" (CLIP's byte-pair merges)."""
    path: str | None = None
    """The sentencepiece .model file, or CLIP's bpe_simple_vocab_16e6.txt.gz; null with clip_bpe: taken from an
    installed open_clip_torch."""


@dataclass
class Data:
    train: list[Source] = field(default_factory=list)
    """Where training pairs come from."""
    heldout: list[str] = field(default_factory=list)
    """Shards of held-out pairs for the evaluation during the run; empty: no evaluation."""
    image_extensions: list[str] = field(default_factory=lambda: ["jpg", "jpeg", "png", "webp"])
    """Members of a sample that can be its image, in order of preference."""
    caption_extension: str = "txt"
    """Member that holds the caption: "txt", or "json"."""
    caption_field: str = "caption"
    """With "json": the field that holds the caption, or a list of captions of which one is drawn per visit."""
    category_field: str | None = None
    """JSON field with the category of a held-out pair, for zero-shot classification; null: none."""
    streams: int = 8
    """Virtual streams S. Divides the global batch; every world size that divides S gives the same run (design: order
    of samples)."""
    cache_folder: str = "~/.cache/cmpt"
    """Shard indexes and fetched shards live here; the processes of a host share it."""
    cache: str = "remote"
    """Which shards are fetched whole into the cache ahead of need: those behind URLs ("remote"), also those of paths,
    for slow network file systems ("always"), or none ("never": shards behind URLs are refused)."""
    cache_limit_bytes: float = 200e9
    """Most bytes of fetched shards in the cache folder; those used longest ago make room. It must hold two shards for
    every stream and source of a host: the one that is read, and the next."""
    fetch_workers: int = 4
    """Shards that a process fetches at a time."""
    fetch_attempts: int = 6
    """Tries to fetch a shard, with waits of 1, 2, 4, ... seconds between them (a minute at most)."""
    fetch_timeout_s: float = 60.0
    """A fetch that brings no byte for so long has failed."""
    allow_pipe: bool = False
    """Whether shards may be "pipe:COMMAND" URLs, which hand COMMAND to a shell."""
    broken_shards: str = "skip"
    """A shard that is cut short, damaged or empty, or cannot be fetched: "skip": what can be read of it is used, the
    loss is counted; "stop": the run ends. A path that does not exist always ends it."""
    workers: int = 2
    """Threads per process that read, decode and tokenize."""
    prefetch_batches: int = 4
    """Finished batches that wait ahead of the step, per process. At least 1."""
    stall_s: float = 30.0
    """A batch that is waited for longer is reported, with the place where its data stand still."""
    min_image_side: int = 4
    """An image with a shorter side, in pixels, is rejected: tracking pixels, separators."""
    max_image_pixels: int = 100_000_000
    """An image whose header promises more pixels is rejected before memory is taken (decompression bomb)."""
    max_image_bytes: int = 100_000_000
    """An image of more bytes is rejected unread."""
    max_caption_characters: int = 10_000
    """A longer caption is rejected: a page, not a caption."""


@dataclass
class Decode:
    """How encoded images become pixels."""

    backend: str = "auto"
    """"cpu"; "dali": NVIDIA DALI on the GPU (its CPU mode where there is none, which is slower than "cpu"); "auto":
    DALI where there are a GPU and a DALI, else the CPU."""
    threads: int = 4
    """dali: threads per process of DALI's own, for what the GPU leaves to the host."""
    hardware_share: float = 0.65
    """dali: share of a batch that goes to the hardware decoder, on GPUs that have one (DALI's `hw_decoder_load`)."""


@dataclass
class Image:
    size: int = 224
    """Side of the square training image in pixels; a multiple of the patch size. The position table has this grid;
    a phase with another size interpolates it. Evaluation is always at this size."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Share of the image area that a training crop keeps, drawn uniformly (paper, section 4.1)."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    """Aspect ratio of a training crop, drawn log-uniformly."""
    flip: bool = False
    """Mirror half of the training images left to right."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Per-channel mean of pixel values in 0 … 1 (CLIP)."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Per-channel deviation of pixel values in 0 … 1 (CLIP)."""


@dataclass
class Tower:
    width: int | None = None
    """Channels D of the residual stream."""
    layers: int | None = None
    """Transformer blocks."""
    heads: int | None = None
    """Attention heads; divides the width."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward part, as a multiple of the width."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in every LayerNorm of the tower."""
    layer_scale_init: float | None = None
    """Initial gain of every residual branch, learned per channel (LayerScale, arXiv 2103.17239); null: none."""


@dataclass
class Vision(Tower):
    pooling: str = "class_token"
    """"class_token", or "average": the mean over the patches that are kept, after the last LayerNorm."""


@dataclass
class Text(Tower):
    pooling: str = "eos"
    """"eos": at the end-of-text token. "argmax": at the token with the largest id, which is the end of text in CLIP's
    vocabulary and what open_clip's own models do."""


@dataclass
class Model:
    preset: str | None = None
    """A named size from recipe/presets.py, e.g. "ViT-B-16"; fills what is not given below. Null: all is given."""
    init_from: str | None = None
    """Start from these weights, of exactly this architecture: an open_clip folder (what tools/export.py writes, or a
    local copy of a hub repository), or a .safetensors or .pt file of open_clip's native ViT kind."""
    patch_size: int | None = None
    """Side of a square patch in pixels."""
    embed_dim: int | None = None
    """Width E of the joint embedding."""
    vision: Vision = field(default_factory=Vision)
    text: Text = field(default_factory=Text)
    context_length: int = 77
    """Most tokens of a caption, end-of-text included; longer ones are cut before it."""
    vocab_size: int | None = None
    """Rows of the token embedding; null: the tokenizer's size."""
    quick_gelu: bool = False
    """x * sigmoid(1.702 x), as OpenAI's weights need, instead of the exact GELU."""
    temperature_init: float = 0.07
    """Initial temperature; logit_scale starts at ln(1 / this) (CLIP, section 2.5)."""
    logit_scale_max: float = 100.0
    """exp(logit_scale) is held at or below this (CLIP, section 2.5)."""
    logit_bias_init: float | None = None
    """Initial value of a learned bias on the logits, for the sigmoid loss (SigLIP: -10); null: no bias."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""


@dataclass
class Masking:
    """Which patches of an image are hidden. A field with a twin `..._end` moves linearly from the one to the other over
    the phase; with null there it stays."""

    strategy: str = "cluster"
    """"cluster" (arXiv 2405.08815); "random" (FLIP, arXiv 2212.00794); "centred" (GLIP, arXiv 2403.15837); "block": a
    contiguous rectangle; "grid": one patch of every 2 x 2 stays (both CLIPA, arXiv 2305.07017); "scores": those stay
    that a function of your own scores highest; "none". Smaller images instead of masks (RECLIP, arXiv 2304.06028) are
    phases with an `image.size`."""
    ratio: float = 0.5
    """Share of patches to hide: the global mean for "cluster", exact per image for the others; "grid": 0.75, less where
    an odd number of rows or columns leaves cells at the edge smaller."""
    ratio_end: float | None = None
    anchor_ratio: float = 0.03
    """cluster: anchors per image as a share of its patches (paper: under 5 %); at least one."""
    anchor_ratio_end: float | None = None
    anchors: int | None = None
    """cluster: anchors per image as a number, instead of `anchor_ratio`; null: the share decides."""
    min_ratio: float = 0.3
    """cluster: β, the least share that is hidden of every image, topped up by uniform random drops; <= ratio. At the
    ratio itself no image may lose more, so the threshold rises until clusters hardly decide."""
    min_ratio_end: float | None = None
    threshold: float | None = None
    """cluster: a fixed similarity threshold; null: the controller holds the mean ratio at `ratio`."""
    embedding_share: float = 0.0
    """cluster: α, the share of the patch embeddings' cosine in the similarity; the rest is that of the pixels (paper,
    section 3.3). The paper's embedding variant: 0 with `embedding_share_end: 1`."""
    embedding_share_end: float | None = None
    embedding_positions: bool = False
    """cluster: the embeddings are compared with their position embedding added."""
    normalise_patches: bool = True
    """cluster: pixels of a patch are compared less their mean (Pearson correlation); false: the cosine of the
    CLIP-normalised pixels, in which brightness counts (the paper's ablation)."""
    constant_patches: str = "alike"
    """cluster: patches of one value, which have no direction to compare, are "alike": similar to each other (1) and to
    nothing else (0); or "unlike": similar to nothing. Plain white is such a patch only where `image.mean` and
    `image.std` are the same for all channels; with CLIP's, plain patches compare by their colour."""
    block: str = "keep"
    """block: whether the rectangle is what is kept, or what is dropped ("drop")."""
    scores: str | None = None
    """scores: the function as "module:name", found on the Python path or in the current folder, called with images_BCHW
    (uint8), the patch size and ordinal_B (int64); returns a score per patch, [B, L]. Of every image the highest
    L * (1 - ratio) stay, among equal ones at random; NaN is the lowest. It must depend on its arguments alone."""


@dataclass
class TextMasking:
    """Which tokens of a training caption are left out; captions that are short enough stay whole."""

    strategy: str = "none"
    """"truncate": the first ones stay; "random"; "block": a contiguous run (CLIPA, arXiv 2305.07017); "frequency": rare
    words are likelier to stay (CLIPF, arXiv 2412.16148); what stays keeps its order. "none": only the context length
    cuts."""
    tokens: int | None = None
    """Captions keep at most this many tokens, begin and end of text included; <= model.context_length."""
    frequencies: str | None = None
    """frequency: the table of words that `tools/count_words.py` writes."""
    threshold: float = 1e-6
    """frequency: t. A word of relative frequency f loses max(0, 1 - sqrt(t / f)) of its rank (CLIPF, section 3)."""


@dataclass
class Optimizer:
    lr: float = 5e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup: str = "2000 steps"
    """Linear warm-up from 0, then cosine; both by samples seen."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2
    """Decoupled decay; not on gains, biases and the temperature."""
    clip_norm: float | None = None
    """Global gradient norm is cut to this; null: no clipping."""
    vision_layer_decay: float = 1.0
    """Each block of the image tower learns at this many times the rate of the block after it (layer-wise decay, BEiT,
    arXiv 2106.08254, appendix); the embedding is below the first block, the projection has the full rate. 1: off."""
    text_layer_decay: float = 1.0
    """The same for the text tower."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, this much of which stays at every step, e.g. 0.9999. It is in
    every checkpoint, and exported with --ema; training does not see it. Null: none."""


@dataclass
class Loss:
    kind: str = "infonce"
    """"infonce" (CLIP), or "sigmoid" (SigLIP, arXiv 2303.15343), which needs model.logit_bias_init."""
    chunk_rows: int = 1024
    """Rows of the logit matrix that exist at one time; the loss needs 4 bytes x chunk_rows x global batch, twice that
    with "sigmoid", and the gradients of the embeddings (tools/bench_loss.py)."""


@dataclass
class Engine:
    batch_size: int = 256
    """Global batch G in samples, over all ranks."""
    micro_batch_size: int | None = None
    """Pairs of a rank that go through the towers at once; null: all. Fewer need less memory for the same global batch
    and loss: gradient caching (GradCache, arXiv 2101.06983), which costs one more forward pass."""
    precision: str = "bf16"
    """Of activations and products: "bf16", "fp16" (with a dynamic loss scale) or "fp32". Parameters, gradients,
    optimizer and temperature are fp32 in all of them."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage, 0 … 3; one process alone runs as stage 0, since there is nothing to share."""
    offload_optimizer: bool = False
    """Keep optimizer state and master weights in host memory and step there; needs zero_stage >= 1."""
    overlap_communication: bool | None = None
    """Reduce gradients while the backward pass goes on; null: at stages 2 and 3."""
    bucket_elements: int = 500_000_000
    """Gradient elements that are reduced, and parameter elements that are gathered, at one time, at most those of the
    model: fewer need less memory, more use the network better."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Passed through into the DeepSpeed configuration, over what cmpt sets; not for what other fields say."""


@dataclass
class Guard:
    """What watches over a run. A step is judged before the optimizer uses its gradient."""

    action: str = "skip"
    """What happens to a batch whose loss or gradient is not finite, or whose loss is a spike: "skip" leaves it out;
    "rewind" leaves it out and goes on, with the next batch, from the weights of the last checkpoint (PaLM, arXiv
    2204.02311, section 5.1); "stop" ends the run."""
    spike: float | None = 10.0
    """A loss is a spike when it is this many robust standard deviations (1.4826 x the median distance from the median)
    above the median of the last `window` losses; null: no loss is one."""
    window: int = 128
    """Losses that the estimate is made of; until there are half as many, no loss is a spike."""
    limit: int = 20
    """After so many refused batches, unequal weights included, in the whole run, the next one ends it."""
    weights_every: str | None = "500 steps"
    """How often all ranks compare the weights that they hold alike; before every checkpoint too. Null: never. Above
    ZeRO stage 0, where each step overwrites what the ranks compute with, only "1 steps" sees every flipped bit."""
    unequal_weights: str = "stop"
    """When they are not alike: "stop" ends the run, "rewind" goes on from the weights of the last checkpoint."""
    watchdog_seconds: float | None = 20.0
    """A process that gives no sign of life for so long is named with its Python stack, and the run ends; so is one
    whose step takes this long and ten times the longest of its last 20 steps. Data may take 300 s; evaluations,
    checkpoints and the first steps of a phase half an hour. Null: no watchdog."""
    dry_run: bool = True
    """Before the first step, one pass at the most tokens that masking and captions can give, so that too little memory
    shows at once; it changes nothing."""


@dataclass
class Evaluation:
    every: str | None = None
    """How often the held-out pairs and the suite are evaluated during the run; at the end always; null: only at the
    end."""
    batch_size: int = 128
    """Samples per rank and forward pass."""
    prompts: list[str] = field(default_factory=lambda: ["a picture of {}", "{}"])
    """Templates for zero-shot classification of the held-out pairs; the class embedding is the mean over them."""
    suite: str | None = None
    """A suite file, e.g. "recipes/eval/paper.yaml": tasks of zero-shot classification, retrieval, linear probing and
    composition; null: the held-out pairs alone."""
    suite_folder: str = "."
    """The folder in which the sets of the suite lie. A task whose set is not there is left out with a warning."""
    tasks: list[str] = field(default_factory=list)
    """The tasks of the suite to evaluate, whose sets must be there; empty: all whose sets are."""


@dataclass
class Phase:
    name: str = ""
    """Appears in logs and metrics."""
    duration: str = ""
    """How long this phase lasts; warm-up and cosine are those of the phase."""
    set: dict[str, Any] = field(default_factory=dict)
    """Dotted overrides that hold during the phase; only masking.*, text_masking.*, image.size, image.crop_scale,
    optimizer.lr, optimizer.min_lr, optimizer.warmup."""


@dataclass
class Recipe:
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    decode: Decode = field(default_factory=Decode)
    image: Image = field(default_factory=Image)
    model: Model = field(default_factory=Model)
    masking: Masking = field(default_factory=Masking)
    text_masking: TextMasking = field(default_factory=TextMasking)
    optimizer: Optimizer = field(default_factory=Optimizer)
    loss: Loss = field(default_factory=Loss)
    engine: Engine = field(default_factory=Engine)
    guard: Guard = field(default_factory=Guard)
    evaluation: Evaluation = field(default_factory=Evaluation)
    phases: list[Phase] = field(default_factory=list)
    """Phases in order, each with its own duration; empty: one phase of `run.duration`."""
