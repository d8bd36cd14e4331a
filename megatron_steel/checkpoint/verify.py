"""Do a checkpoint and a Hugging Face folder hold the same model?

Two questions, because each misses what the other finds: are all weights equal to the bit, and do both libraries make
the same logits of them?
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_steel.checkpoint.adapters import model_tensors
from megatron_steel.checkpoint.hf import hf_tensors
from megatron_steel.checkpoint.hf_folder import HFWeights
from megatron_steel.checkpoint.state import TOKENIZER_FOLDER, load_tokenizer, read_state
from megatron_steel.checkpoint.store import load_weights
from megatron_steel.config.check import check_heads, check_layers
from megatron_steel.config.families import FAMILIES
from megatron_steel.config.family import tied
from megatron_steel.config.load import from_flat
from megatron_steel.config.schema import Config, ParallelConfig
from megatron_steel.model.build import Model, build_model
from megatron_steel.runtime.world import World

# English and Chinese, because a tokenizer or an embedding can be right for one and wrong for the other.
TEXTS = (
    "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little.",
    "\u8bdd\u8bf4\u5929\u4e0b\u5927\u52bf\uff0c\u5206\u4e45\u5fc5\u5408\uff0c\u5408\u4e45\u5fc5\u5206\u3002",
)
RANDOM_TOKENS = 64
# Both compute in fp32, in another order: differences are some units in the last place of the largest logits.
TOLERANCE = 1e-4
TOLERANCE_OF_LARGEST = 1e-5


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far two models are apart."""

    max_difference: float
    """Largest absolute difference of any logit."""
    largest_logit: float
    """Largest absolute logit of transformers, which the difference is measured by."""
    top1_agreement: float
    """Share of positions with the same most likely token."""
    tokens: int
    """Positions compared."""
    different: list[str]
    """Hugging Face names of tensors that are not equal to the bit, or that only one side has."""

    @property
    def same(self) -> bool:
        """Whether both are the same model: equal weights, and logits that differ by rounding only."""
        tolerance = max(TOLERANCE, TOLERANCE_OF_LARGEST * self.largest_logit)
        return not self.different and self.max_difference <= tolerance

    def one_line(self) -> str:
        """Numbers and verdict."""
        tensors = "all weights equal"
        if self.different:
            tensors = f"{len(self.different)} weights differ, the first is {self.different[0]}"
        return (
            f"{self.tokens} tokens, float32: max |logit difference| {self.max_difference:.3g}, top-1 agreement "
            f"{self.top1_agreement:.4f}; {tensors}: {'same model' if self.same else 'DIFFERENT'}"
        )


def different_tensors(checkpoint: Path, folder: Path) -> list[str]:
    """Names of weights that differ in shape, precision or any bit between a checkpoint and a folder."""
    state = read_state(checkpoint)
    size = from_flat(state.config).size
    theirs = HFWeights(folder)
    seen, found = set(), []
    for name, ours in hf_tensors(model_tensors(checkpoint, state), size, state.vocab_size):
        seen.add(name)
        if name not in theirs.places or theirs.shape(name) != tuple(ours.shape):
            found.append(name)
            continue
        other = theirs.get(name)
        if other.dtype != ours.dtype or not torch.equal(other.view(torch.uint8), ours.view(torch.uint8)):
            found.append(name)
    own_head = {"lm_head.weight"} if tied(size) else set()
    return found + theirs.unused(seen | own_head, FAMILIES[size.model_family].ignore)


def load_for_inference(
    checkpoint: Path, world: World, bf16: bool | None = None, scores: bool = False
) -> tuple[Model, Config]:
    """The model of a checkpoint on the layout of ``world``, in evaluation mode, with its options.

    ``bf16`` overrides the precision it was trained in (fp32 when False); FP8, which takes only some numbers of tokens,
    becomes bf16. The layer backend is this machine's best, whatever wrote the checkpoint. Raises ``ValueError`` when
    the model cannot be split like that, or for a reward model where ``scores`` are of no use.
    """
    state = read_state(checkpoint)
    config = from_flat(state.config)
    if config.size.score_head and not scores:
        raise ValueError(f"{checkpoint} is a reward model, which gives texts a score; give a language model")
    config.parallel = ParallelConfig(
        tensor_model_parallel_size=world.tensor_size, pipeline_model_parallel_size=world.pipeline_size
    )
    check_heads(config)
    check_layers(config)
    config.training.fp8_format = None
    config.memory.recompute_granularity = None
    config.training.cuda_graph_impl = "none"
    # The one backend with adapters, and with attention for texts of different lengths and for a cache.
    config.parallel.transformer_impl = "torch"
    if bf16 is not None:
        config.training.bf16, config.training.fp16 = bf16, False
    model = build_model(config, state.vocab_size, world, training=False)
    load_weights(checkpoint, model)
    for chunk in model.chunks:
        chunk.eval()
    return model, config


def sample_ids(checkpoint: Path, vocab_size: int) -> list[Tensor]:
    """Token ids [1, S] of the sample texts, and random ids over the whole vocabulary."""
    rows = [torch.randint(vocab_size, (1, RANDOM_TOKENS), generator=torch.Generator().manual_seed(0))]
    if (checkpoint / TOKENIZER_FOLDER).is_dir():
        tokenizer = load_tokenizer(checkpoint)
        rows += [torch.tensor([tokenizer.encode(text)]) for text in TEXTS]
    return rows


@torch.no_grad()
def compare_with_hf(
    checkpoint: Path,
    folder: Path,
    world: World,
    texts: list[Tensor] | None = None,
    trust_remote_code: bool = False,
) -> Comparison:
    """Compare the weights, and run both models on the same ids in fp32 on one process.

    ``texts`` are rows of token ids [1, S]; sample texts when left out. ``trust_remote_code`` lets ``transformers`` run
    the code in the folder. Raises ``ValueError`` when the folder does not load with ``transformers``.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    different = different_tensors(checkpoint, folder)
    model, config = load_for_inference(checkpoint, world, bf16=False, scores=True)
    kind = AutoModelForSequenceClassification if config.size.score_head else AutoModelForCausalLM
    try:
        theirs = kind.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=trust_remote_code
        ).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"--hf {folder}: transformers cannot load it: {error}") from error
    if config.size.score_head:
        # Or the random ids would be padding from some of them on.
        theirs.config.pad_token_id = None
    differences, sizes, agreeing, count = [], [], 0, 0
    for ids in texts if texts is not None else sample_ids(checkpoint, model.vocab_size):
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        ours = model.language_models()[0](ids.to(world.device), positions.to(world.device), None)
        # The score of the text, [1, 1], or logits [S, V].
        part = ours[:, -1:] if config.size.score_head else ours[0, :, : model.vocab_size]
        ours_SV, theirs_SV = part.float().cpu(), theirs(ids).logits.reshape(part.shape)
        differences.append((ours_SV - theirs_SV).abs().max())
        sizes.append(theirs_SV.abs().max())
        agreeing += int((ours_SV.argmax(-1) == theirs_SV.argmax(-1)).sum())
        count += theirs_SV.shape[0]
    # Unlike Python's max, torch's lets a NaN through, which is never within the tolerance.
    return Comparison(
        max_difference=torch.stack(differences).max().item(),
        largest_logit=torch.stack(sizes).max().item(),
        top1_agreement=agreeing / count,
        tokens=count,
        different=different,
    )
