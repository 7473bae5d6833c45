"""Settings of the training of language models and tokenizers: plain dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mm.errors import InputError

from ..train.settings import Export, Lora, Optim, Trainer


@dataclass(frozen=True, kw_only=True)
class CorpusData:
    """Texts and conversations.

    Args:
        path: a .txt, .md, .jsonl, .csv, .tsv or .parquet file, plain or .gz, a folder of such, or wikitext-2 or
            chitchat, which come with an installed package. JSONL lines and table rows hold a text, or a conversation
            as messages of role and content.
        split: the documents of a .txt or .md file: the file, the lines between two blank ones, or a line;
            <|endoftext|> ends a document in any case.
    """

    path: str
    split: Literal["file", "blank", "line"] = "file"


@dataclass(frozen=True, kw_only=True)
class LmData(CorpusData):
    """Texts and conversations, and how they become batches.

    Args:
        val: another source, to evaluate on (none: what is held out; of wikitext-2 its own validation part).
        holdout: the share of the tokens that is held out for evaluation where there is no `val`.
        length: tokens of a row.
        batch_size: rows of a step, all processes together.
        tokenizer: a directory with the tokenizer to use (none: the model's own or, for a new model, one that is
            trained on the corpus).
        vocab: the entries of that trained tokenizer.
        answers: learn only the assistant's messages of conversations.
        share: share of the tokens that are hidden to be predicted, by the objectives that hide some.
        span: the mean number of tokens that span corruption hides together.
        cache: the folder that keeps the texts as tokens (none: one in the run's directory).
        workers: processes that make batches.
    """

    val: str | None = None
    holdout: float = 0.05
    length: int = 512
    batch_size: int = 8
    tokenizer: str | None = None
    vocab: int = 4096
    answers: bool = True
    share: float = 0.15
    span: float = 3.0
    cache: str | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise InputError(f"data.holdout must lie in [0, 1), not {self.holdout}")
        if not 0 < self.share < 1 or self.span < 1:
            raise InputError("data.share must lie in (0, 1) and data.span be at least 1, not "
                             f"{self.share} and {self.span}")
        for name in ("length", "batch_size", "vocab"):
            if getattr(self, name) < 1:
                raise InputError(f"data.{name} must be at least 1, not {getattr(self, name)}")
        if self.length < 2:
            raise InputError("data.length must be at least 2 tokens, so that one can be predicted")


@dataclass(frozen=True, kw_only=True)
class TokenizerJob:
    """Train a byte-level BPE tokenizer on a corpus.

    Args:
        out: the directory for tokenizer.json and tokenizer_config.json, which transformers opens too.
        vocab: entries, with the 256 bytes and the special tokens.
        chat: add a chat template and its tokens (none: if the corpus holds conversations).
        mask: add <mask>, for masked language models.
        sentinels: tokens <extra_id_0>, <extra_id_1>, ... to add, for span corruption.
    """

    data: CorpusData
    out: str = "tokenizer"
    vocab: int = 4096
    chat: bool | None = None
    mask: bool = False
    sentinels: int = 0


@dataclass(frozen=True, kw_only=True)
class LmExperts:
    """A mixture of experts in place of every MLP: `chosen` of `count` a token, in the layout of Qwen3-MoE or,
    with `correction`, chosen by corrected scores that keep them equally busy without a loss (DeepSeek-V3).

    Args:
        mlp: the ratio of an expert's hidden width to the model's.
    """

    count: int = 8
    chosen: int = 2
    mlp: float = 1.0
    correction: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.chosen <= self.count:
            raise InputError(f"shape.experts.chosen should be 1 to {self.count}, not {self.chosen}")


@dataclass(frozen=True, kw_only=True)
class LmShape:
    """A model to be trained from scratch: for the objective `next` a decoder in the layout of Llama, or of Qwen3
    with `qk_norm`, for `masked` an encoder in that of ModernBERT without windows, for `spans` an encoder-decoder
    in that of T5 v1.1, each side `depth` deep.

    Args:
        mlp: the ratio of hidden to model width of the gated MLP, rounded up to a multiple of 32 channels.
        kv_heads: key and value heads of grouped-query attention (none: as many as heads).
        context: in tokens (none: data.length).
        tied: whether the table of token embeddings scores the vocabulary too.
        theta: base of the rotary positions.
        experts: mixtures of experts in place of a decoder's MLPs (none: there are none).
    """

    width: int = 256
    depth: int = 6
    heads: int = 4
    kv_heads: int | None = None
    mlp: float = 2.75
    context: int | None = None
    tied: bool = True
    qk_norm: bool = False
    theta: float = 10000.0
    dropout: float = 0.0
    experts: LmExperts | None = None

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2:
            raise InputError(f"shape.width {self.width} does not give {self.heads} heads of one even width")
        if self.heads % (self.kv_heads or self.heads):
            raise InputError(f"shape.heads {self.heads} cannot share {self.kv_heads} key/value heads")


@dataclass(frozen=True, kw_only=True)
class LmLoss:
    """Cross-entropy over the vocabulary.

    Args:
        z_loss: weight of the mean square of log Z (PaLM: 1e-4).
        rows: positions whose logits exist at a time (none: as many as take 16 MiB).
        balance: weight of the balance loss of mixtures of experts, the mean over layers (Switch, 2021).
        router_z_loss: and of the mean square of log Z of the router (ST-MoE, 2022).
    """

    z_loss: float = 0.0
    rows: int | None = None
    balance: float = 0.01
    router_z_loss: float = 0.001

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise InputError(f"loss.rows must be at least 1, not {self.rows}")


@dataclass(frozen=True, kw_only=True)
class LmOptim(Optim):
    """As for every run, with a choice of what moves the matrices inside blocks; AdamW moves the rest.

    Args:
        kind: `muon` orthogonalises their momentum (Jordan, 2024) at the learning rate of AdamW (Liu et al., 2025).
        momentum: Muon's momentum.
        correction: the amount by which a step moves the corrections of experts that are chosen too seldom or too often
            (DeepSeek-V3).
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    beta2: float = 0.95
    eps: float = 1e-8
    ema: float = 0.0
    momentum: float = 0.95
    correction: float = 0.001


@dataclass(frozen=True, kw_only=True)
class LmJob:
    """Train a language model on texts, or go on with one.

    Args:
        out: the directory of the run; the same command continues what is there.
        model: a checkpoint (directory or hub name) to go on from, with its own tokenizer, instead of a new `shape`.
        objective: predict the `next` token (a decoder), `masked` ones (an encoder), or `spans` that are left out of a
            text (an encoder-decoder).
        lora: none trains the model itself.
        checkpointing: recompute every n-th block in the backward pass instead of keeping its activations (0: none).
        compile: the blocks, by torch.compile.
        shard: spread weights, gradients and optimizer state over the devices (FSDP2) instead of a copy on each (DDP).
        tensor: devices that split every layer between them (tensor parallelism); above 1, the rest is spread.
    """

    data: LmData
    out: str = "runs/lm"
    model: str | None = None
    shape: LmShape = LmShape()
    objective: Literal["next", "masked", "spans"] = "next"
    loss: LmLoss = LmLoss()
    lora: Lora | None = None
    checkpointing: int = 0
    compile: bool = False
    shard: bool = False
    tensor: int = 1
    optim: LmOptim = LmOptim()
    trainer: Trainer = Trainer()
    export: Export = Export()

    def __post_init__(self) -> None:
        if self.checkpointing < 0:
            raise InputError(f"checkpointing must not be negative, not {self.checkpointing}")
        if self.objective != "next" and (self.shape.qk_norm or self.shape.kv_heads or self.shape.experts):
            raise InputError("shape.qk_norm, kv_heads and experts belong to decoders: leave them out with "
                             f"{self.objective}")
        if self.tensor < 1 or self.trainer.devices % self.tensor:
            raise InputError(f"trainer.devices {self.trainer.devices} is no multiple of tensor {self.tensor}")
        if self.objective == "spans" and (self.shard or self.tensor > 1):
            raise InputError("an encoder-decoder trains with a copy on every device: leave out shard and tensor")
