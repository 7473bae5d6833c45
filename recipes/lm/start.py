"""The model that the training of a language model starts from: a new one, or a checkpoint."""

from __future__ import annotations

from dataclasses import replace

import torch

from mm import spec
from mm.errors import InputError
from mm.spec.schema import require
from mm.text.decoder import TextDecoder
from mm.text.encoder import TextEncoder
from mm.text.seq2seq import Seq2Seq
from mm.tokenizer.tokenizer import Tokenizer

from .settings import LmExperts, LmJob, LmShape

Model = TextDecoder | TextEncoder | Seq2Seq
KINDS = {"next": TextDecoder, "masked": TextEncoder, "spans": Seq2Seq}
MODELS = {spec.DecoderSpec: TextDecoder, spec.EncoderSpec: TextEncoder, spec.Seq2SeqSpec: Seq2Seq}


def opened(job: LmJob) -> Model | None:
    """The checkpoint to go on from, in float32. Raises InputError where it cannot be trained for the objective."""
    if job.model is None:
        return None
    model = KINDS[job.objective].from_pretrained(job.model, dtype=torch.float32)
    require(job.objective != "masked" or model.head is not None,
            f"{job.model} has no head that scores the vocabulary, which training needs")
    require(model.tokenizer is not None or job.data.tokenizer is not None,
            f"{job.model} has no tokenizer: give one with data.tokenizer")
    return model


def starting_model(job: LmJob, model: Model | None, tokenizer: Tokenizer) -> Model:
    """`model`, or a new one of the shape: the same weights for the same seed. Raises InputError where the tokenizer or
    the length of rows does not fit."""
    torch.manual_seed(job.trainer.seed)
    if model is None:
        model = KINDS[job.objective](new_spec(job, tokenizer))
    table = embed_of(model).positions
    if table is not None and job.data.length > table.rows:
        raise InputError(f"data.length {job.data.length} is more than the {table.rows} positions of the model")
    model.tokenizer = tokenizer
    return model.train()


def embed_of(model: Model) -> spec.Embed:
    return model.spec.decoder.embed if isinstance(model, Seq2Seq) else model.spec.embed


def new_spec(job: LmJob, tokenizer: Tokenizer) -> spec.DecoderSpec | spec.EncoderSpec | spec.Seq2SeqSpec:
    shape, vocab, context = job.shape, tokenizer.vocab_size, job.shape.context or job.data.length
    if job.objective == "spans":
        return new_seq2seq(shape, vocab, context, tokenizer.pad_id, tokenizer.eos_id)
    return (new_encoder if job.objective == "masked" else new_decoder)(shape, vocab, context)


def new_decoder(shape: LmShape, vocab: int, context: int) -> spec.DecoderSpec:
    """The layout of Llama or, with `qk_norm`, of Qwen3, with experts of Qwen3-MoE."""
    norm = spec.RMSNorm(eps=1e-5)
    mixer = replace(attention(shape), window=spec.CAUSAL, qk_norm=spec.QKNorm(norm=norm) if shape.qk_norm else None)
    mlp = gated(shape, "silu") if shape.experts is None else mixture(shape, shape.experts)
    layer = spec.Layer(mixer=mixer, mlp=mlp, norm=norm, dropout=shape.dropout)
    stack = spec.Stack(dim=shape.width, layers=(layer,) * shape.depth, final_norm=norm)
    return spec.DecoderSpec(embed=spec.Embed(vocab=vocab), stack=stack, context=context,
                            head=spec.LMHead(tied=shape.tied))


def new_encoder(shape: LmShape, vocab: int, context: int) -> spec.EncoderSpec:
    """The layout of ModernBERT, every layer of which sees everything."""
    norm = spec.LayerNorm(bias=False)
    layer = spec.Layer(mixer=attention(shape), mlp=gated(shape, "gelu"), norm=norm, dropout=shape.dropout)
    layers = (replace(layer, mixer_norm=False), *(layer,) * (shape.depth - 1))
    head = spec.LMHead(tied=shape.tied, bias=True, transform=spec.Transform(norm=norm, bias=False))
    stack = spec.Stack(dim=shape.width, layers=layers, final_norm=norm)
    return spec.EncoderSpec(embed=spec.Embed(vocab=vocab, norm=norm), stack=stack, context=context, head=head)


def new_seq2seq(shape: LmShape, vocab: int, context: int, start: int, end: int) -> spec.Seq2SeqSpec:
    """The layout of T5 v1.1, which has no rope."""
    mixer = replace(attention(shape), rope=None, scale=1.0)
    layer = spec.Layer(mixer=mixer, mlp=gated(shape, "gelu_tanh"), norm=spec.RMSNorm(), dropout=shape.dropout)
    reading = replace(layer, mixer=replace(mixer, window=spec.CAUSAL), cross=mixer)
    embed = spec.Embed(vocab=vocab, dropout=shape.dropout)
    encoder, decoder = (spec.Stack(dim=shape.width, layers=(one,) * shape.depth, final_norm=one.norm,
                                   relative=spec.Buckets(two_sided=one is layer)) for one in (layer, reading))
    head = spec.LMHead(tied=shape.tied, scale=shape.width**-0.5 if shape.tied else 1.0)
    return spec.Seq2SeqSpec(
        encoder=spec.EncoderSpec(embed=embed, stack=encoder, context=context),
        decoder=spec.DecoderSpec(embed=embed, stack=decoder, context=context, head=head), start=(start,), end=end)


def attention(shape: LmShape) -> spec.Attention:
    return spec.Attention(
        heads=shape.heads, kv_heads=shape.kv_heads or shape.heads, head_dim=shape.width // shape.heads, q_bias=False,
        k_bias=False, v_bias=False, out_bias=False, rope=spec.Rope(theta=shape.theta))


def mixture(shape: LmShape, experts: LmExperts) -> spec.Moe:
    router = spec.Router(score="sigmoid" if experts.correction else "softmax", renormalise=True,
                         correction=experts.correction)
    return spec.Moe(experts=experts.count, chosen=experts.chosen, router=router,
                    expert=gated(replace(shape, mlp=experts.mlp), "silu"))


def gated(shape: LmShape, act: str) -> spec.Mlp:
    hidden = -(-int(shape.width * shape.mlp) // 32) * 32
    return spec.Mlp(hidden=hidden, act=act, gated=True, up_bias=False, down_bias=False)
