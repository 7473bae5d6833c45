"""One step of a stream as a program: compiled, exported, captured."""

import codec
import pytest
import torch

from mm.codecs import Mimi
from mm.codecs import mimi as module
from mm.codecs.mimi import Stream
from mm.codecs.spec import MimiSpec, Quantizer, Seanet, mimi_stack
from mm.errors import InputError

STACK = mimi_stack(dim=16, depth=1, heads=2, hidden=32, window=codec.WINDOW)
SPEC = MimiSpec(rate=1600, seanet=Seanet(filters=4, ratios=(8,)), encoder=STACK, decoder=STACK,
                quantizer=Quantizer(codebooks=4, size=32, dim=8))
FRAME, FRAMES = 16, 14  # samples; almost three windows


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return codec.small(SPEC)


def follow(step, state):
    """Codes and waves of two rows, the second of which pauses now and then."""
    said = [step(wave, state=state, rows=torch.tensor([True, i % 3 > 0]))
            for i, wave in enumerate(codec.wave(2, FRAMES * FRAME).split(FRAME, 2))]
    return [torch.cat(x, 2) for x in zip(*said, strict=True)]


def same(model: Mimi, step) -> None:
    for ours, wanted in zip(follow(step, model.init_state(2)), follow(model, model.init_state(2)), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)


def test_it_compiles_into_one_graph_and_is_not_compiled_again(model):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    same(model, torch.compile(model, fullgraph=True, backend=backend))
    assert len(graphs) == 1


@pytest.mark.full
def test_inductor_agrees(model):
    torch._dynamo.reset()
    same(model, torch.compile(model, fullgraph=True))


@pytest.mark.filterwarnings("ignore:No complete tensor")
def test_it_exports_with_its_state_as_an_argument(model, tmp_path):
    example = {"state": model.init_state(2), "rows": torch.tensor([True, False])}
    program = torch.export.export(model, (codec.wave(2, FRAME),), example, strict=False)
    torch.export.save(program, tmp_path / "step.pt2")
    same(model, torch.export.load(tmp_path / "step.pt2").module())


def test_a_stream_is_the_codec_and_never_reads_a_tensor(model, monkeypatch):
    stream = Stream(model, 2, codebooks=4)
    wanted = follow(model, model.init_state(2))
    monkeypatch.setattr(module, "readable", lambda x: False)  # as on a GPU
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a tensor was read"))

    def step(wave, state, rows):
        codes = stream.encode(wave, rows).clone()
        return codes, stream.decode(codes, rows).clone()
    found = follow(step, None)
    monkeypatch.undo()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("call, message", [
    (lambda s: s.encode(torch.zeros(2, 1, 2 * FRAME)), r"takes torch.float32 \(2, 1, 16\) as its input"),
    (lambda s: s.decode(torch.zeros(2, 3, 1, dtype=torch.long)), r"takes torch.int64 \(2, 4, 1\) as its input"),
    (lambda s: s.encode(torch.zeros(2, 1, FRAME), torch.ones(1, dtype=torch.bool)), "torch.bool"),
    (lambda s: s.encode(torch.full((2, 1, FRAME), torch.nan)), "not finite")])
def test_bad_input_of_a_stream(model, call, message):
    with pytest.raises(InputError, match=message):
        call(Stream(model, 2))


@pytest.mark.full
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_graphs_are_the_codec(model):
    on_gpu = codec.small(SPEC).to("cuda")
    on_gpu.load_state_dict(model.state_dict())
    stream, state = Stream(on_gpu, 2), on_gpu.init_state(2)
    for i, wave in enumerate(codec.wave(2, FRAMES * FRAME).cuda().split(FRAME, 2)):
        rows = torch.tensor([True, i % 3 > 0], device="cuda")
        latents = on_gpu.latents(wave, state=state.clone(), rows=rows)
        codes, decoded = on_gpu(wave, state=state, rows=rows)
        codec.same_codes(on_gpu, latents[rows], stream.encode(wave, rows)[rows], codes[rows])
        torch.testing.assert_close(stream.decode(codes, rows), decoded, atol=1e-4, rtol=0)
