"""The options of a run: one dataclass per subject, one flat namespace of flags.

Field names are Megatron-LM's flag names with ``_`` for ``-``. The text under a field is its ``--help``.
A field lives in exactly one group; names are unique across groups, so YAML and the command line are flat.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_steel.config.chat_schema import ChatConfig
from megatron_steel.config.lora import LoraConfig
from megatron_steel.config.model_schema import ModelConfig
from megatron_steel.config.preference_schema import PreferenceConfig

TransformerImpl = Literal["auto", "transformer_engine", "torch", "local"]
TokenizerType = Literal["HuggingFaceTokenizer", "SentencePieceTokenizer", "TikTokenizer", "NullTokenizer"]
DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
Fp8Format = Literal["e4m3", "hybrid"]
Fp8Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]
AmaxAlgorithm = Literal["most_recent", "max"]
CudaGraphs = Literal["none", "local"]
DataFingerprint = Literal["fast", "full"]
RecomputeGranularity = Literal["full", "selective"]
RecomputeMethod = Literal["uniform", "block"]
SequenceMode = Literal["concat", "split", "truncate", "sample"]
WsdDecayStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model and the batch are spread over ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""
    context_parallel_size: int = 1
    """Ranks that share each sample: each has the activations of two chunks of it, and gathers all keys and values."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of each layer out among them; taken from all ranks of a pipeline stage."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert; tensor_model_parallel_size when unset."""
    moe_grouped_gemm: bool = False
    """Multiply with all experts of a layer in one call; needs Transformer Engine."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers per model chunk; switches on the interleaved pipeline schedule."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers on the first pipeline stage, which has the embedding too; the others share the rest evenly."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers on the last pipeline stage, which has the output layer too; the others share the rest evenly."""
    sequence_parallel: bool = False
    """Split activations outside attention and feed-forward over the tensor-parallel ranks."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over the data-parallel ranks (ZeRO-1)."""
    use_torch_fsdp2: bool = False
    """Divide weights, gradients and optimizer state over the data-parallel ranks (ZeRO-3), by PyTorch's FSDP2."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters during the next forward pass; needs the two flags above."""
    distributed_timeout_minutes: float = 10.0
    """A collective that waits longer than this ends the run with an error."""
    transformer_impl: TransformerImpl = "auto"
    """Layer backend: auto takes transformer_engine where it imports and a GPU is there, else torch."""


@dataclass(kw_only=True)
class TokenizerConfig:
    """The tokenizer the data was encoded with."""

    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """Kind of tokenizer."""
    tokenizer_model: str | None = None
    """Folder (Hugging Face) or file (SentencePiece, tiktoken) of the tokenizer."""


@dataclass(kw_only=True)
class DataConfig:
    """What is trained on, and in which order."""

    data_path: list[str] = field(default_factory=list)
    """Indexed datasets: PREFIX or patterns, weighted by their tokens, or WEIGHT PREFIX pairs; PREFIX:max_tokens=2e9."""
    split: str = "969,30,1"
    """Shares of the documents of each data_path for training, validation and test."""
    train_data_path: list[str] = field(default_factory=list)
    """Training data in the same forms; instead of data_path and split."""
    valid_data_path: list[str] = field(default_factory=list)
    """Validation sets as NAME=PREFIX or PREFIX; each is evaluated and logged by name."""
    target_epochs: list[float] = field(default_factory=list)
    """Epochs to see of each source of the data path, in its order, instead of weights; 0 leaves a source out."""
    data_phases: list[str] = field(default_factory=list)
    """Weights by source name from a point on: "start_tokens=2e9 web=0.3 books=0.7" (or start_iteration, _samples)."""
    append_data: bool = False
    """On resume, accept other sources, weights or future phases: a new segment opens over all unused windows."""
    data_fingerprint: DataFingerprint = "fast"
    """How data files are told apart: size, ends and the recorded hash (fast), or every byte, read at start (full)."""
    data_cache_path: str | None = None
    """Folder where a start leaves what it found in the data files, for the next one; None: nothing is kept."""
    max_epochs_per_source: float = 4.0
    """Refuse a run that would repeat a source more often than this."""
    sequence_mode: SequenceMode = "concat"
    """Documents joined end to end, each split into samples, its first seq_length, or a random piece of that length."""
    eod_mask_loss: bool = False
    """No loss on positions whose input is the end-of-document token."""
    reset_attention_mask: bool = False
    """Attention stays inside a document: none crosses an end-of-document token."""
    reset_position_ids: bool = False
    """Positions count from the start of each document, also in rotary embeddings."""
    seed: int = 1234
    """Seed of initialisation, dropout and data order."""


@dataclass(kw_only=True)
class TrainingConfig:
    """Batch, length and numbers of the run."""

    micro_batch_size: int = 1
    """Samples per forward pass on one data-parallel rank."""
    global_batch_size: int | None = None
    """Samples per optimizer step over all ranks; micro_batch_size x data-parallel size when unset."""
    rampup_batch_size: list[int] = field(default_factory=list)
    """START INCREMENT SAMPLES: the batch grows from START by INCREMENT up to the global one over SAMPLES samples."""
    seq_length: int = 1024
    """Tokens per sample."""
    train_iters: int = 100
    """Optimizer steps of the whole run."""
    exit_interval: int | None = None
    """Save and stop after an iteration divisible by this."""
    exit_duration_in_mins: float | None = None
    """Save and stop after this many minutes."""
    check_weight_hash_across_dp_replicas_interval: int | None = None
    """Iterations between comparisons of the replicas' weights; where they differ the run ends and saves nothing."""
    deterministic_mode: bool = False
    """Compute only what gives the same bits again, and stop at what does not; a CPU does so without, a GPU not."""
    manual_gc: bool = False
    """Run Python's garbage collector after the first step and before evaluation and saving, else never."""
    manual_gc_interval: int = 0
    """With --manual-gc, run it every so many iterations too; 0: no."""
    gradient_accumulation_fusion: bool = True
    """Let the product that computes a weight's gradient add it to the main gradient."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 main weights and gradients; fp32 otherwise."""
    fp8_format: Fp8Format | None = None
    """With bf16 and Transformer Engine, layers multiply in FP8: e4m3 everywhere, or e5m2 for gradients (hybrid)."""
    fp8_recipe: Fp8Recipe = "tensorwise"
    """What FP8 scales: tensors, tensors by earlier steps (delayed), blocks of 128 (Hopper) or 32 (mxfp8, Blackwell)."""
    fp8_margin: int = 0
    """With delayed, scaling factors are smaller by 2 to the power of this."""
    fp8_amax_history_len: int = 1
    """With delayed, steps whose largest values are kept."""
    fp8_amax_compute_algo: AmaxAlgorithm = "most_recent"
    """With delayed, the value of the history that decides."""
    first_last_layers_bf16: bool = False
    """With FP8, the first and last layers multiply in bf16."""
    num_layers_at_start_in_bf16: int = 1
    """With first_last_layers_bf16, number of first layers."""
    num_layers_at_end_in_bf16: int = 1
    """With first_last_layers_bf16, number of last layers."""
    cuda_graph_impl: CudaGraphs = "none"
    """Record each layer's kernels once and launch them together after that (local)."""
    pure_bf16: bool = False
    """With bf16, keep no fp32 copy: weights, gradients and both moments in bfloat16, which loses small updates."""
    fp16: bool = False
    """Compute in float16 with fp32 main weights and gradients; the loss is multiplied by a scale that moves."""
    loss_scale: float | None = None
    """A loss scale of fp16 that never changes, instead of one that follows overflows."""
    initial_loss_scale: float = 2.0**32
    """First loss scale of fp16."""
    min_loss_scale: float = 1.0
    """Lowest loss scale of fp16."""
    loss_scale_window: int = 1000
    """Steps without overflow after which the loss scale doubles."""
    hysteresis: int = 2
    """Overflows, counted from the last doubling, before each further one halves the loss scale."""
    allow_non_causal_softmoe: bool = False
    """Train softmoe_v2 or softmoe_v3 although their loss is measured on tokens the model has seen."""


@dataclass(kw_only=True)
class MemoryConfig:
    """What the forward pass does not keep for the backward pass."""

    recompute_granularity: RecomputeGranularity | None = None
    """Compute once more in the backward pass: whole layers (full), or the modules of recompute_modules (selective)."""
    recompute_method: RecomputeMethod | None = None
    """With full: units of recompute_num_layers (uniform, the default), or that many layers of each chunk (block)."""
    recompute_num_layers: int | None = None
    """Layers per unit of uniform, of which only the input is kept, or layers of block; 1 when unset."""
    recompute_modules: list[str] = field(default_factory=list)
    """With selective: core_attn (when empty), mlp, moe, shared_experts, mla_up_proj."""
    cross_entropy_chunk_size: int | None = None
    """Tokens whose logits exist at once; 0: all. Unset: all of a micro-batch up to 4 GiB in fp32, above that 512; on a
    GPU with Triton, which keeps them in the computing type, up to 8 GiB, above that 4096."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its schedules."""

    lr: float = 3e-4
    """Highest learning rate."""
    min_lr: float = 0.0
    """Lowest learning rate after decay."""
    lr_decay_style: DecayStyle = "cosine"
    """Shape of the decay."""
    lr_decay_iters: int | None = None
    """Iteration at which the decay ends; train_iters when unset."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a share of the decay iterations; instead of lr_warmup_iters."""
    lr_wsd_decay_style: WsdDecayStyle = "exponential"
    """Shape of the last phase of WSD."""
    lr_wsd_decay_iters: int | None = None
    """Iterations of the last phase of WSD; required by it."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases have none."""
    decay_embeddings: bool = True
    """Apply weight decay to embedding and output matrices too."""
    adam_beta1: float = 0.9
    """First-moment decay."""
    adam_beta2: float = 0.95
    """Second-moment decay."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    optimizer_cpu_offload: bool = False
    """Keep both moments in host memory and update there; weights and gradients stay on the GPU."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    override_opt_param_scheduler: bool = False
    """On resume, take learning rate, schedule and weight decay from these options, not from the checkpoint."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Where a run is saved and where it starts."""

    save: str | None = None
    """Directory of the run's checkpoints; also gets metrics.jsonl."""
    load: str | None = None
    """Checkpoint directory to start from; missing is an error."""
    auto_resume: bool = False
    """Go on from the newest checkpoint in save when there is one, else start as usual."""
    save_interval: int | None = None
    """Iterations between checkpoints; the last iteration is always saved when save is given."""
    save_total_limit: int | None = None
    """Keep this many newest checkpoints and remove older ones."""
    ckpt_step: int | None = None
    """Load this iteration instead of the newest."""
    finetune: bool = False
    """Take only the weights from load: iteration, optimizer, data order and random state start fresh."""


@dataclass(kw_only=True)
class LoggingConfig:
    """What is reported, and where."""

    log_interval: int = 10
    """Iterations between log lines."""
    tensorboard_dir: str | None = None
    """Write TensorBoard events here."""
    wandb_project: str | None = None
    """Report to this Weights & Biases project; offline when it cannot be reached."""
    wandb_exp_name: str | None = None
    """Name of the Weights & Biases run."""
    wandb_save_dir: str | None = None
    """Directory of the Weights & Biases files; SAVE when unset."""
    eval_interval: int | None = None
    """Iterations between evaluations on the validation sets; only at the end when unset."""
    eval_iters: int = 100
    """Global batches per evaluation and validation set."""


@dataclass(kw_only=True)
class Config:
    """Everything a run needs to know."""

    config: str | None = None
    """YAML file with the same keys as the flags; the command line wins."""
    model: str | None = None
    """Preset name (steel_tiny, steel_1b, ...) or Hugging Face folder; expands to the sizes below."""
    size: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
