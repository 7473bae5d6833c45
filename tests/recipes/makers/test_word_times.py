"""Times of words from the durations of phonemes, and the ONNX model that tells them."""

import numpy as np
import pytest

from mm.errors import InputError
from mm.recipes.makers.word_times import LASTING, placed, telling, word_times


def test_words_where_their_phonemes_are():
    lasting = np.array([0.4, 0.1, 0.1, 0.05, 0.2, 0.3, 0.5, 0.6])  # pause, "ab", space, "cd", ".", pause
    assert placed("Ah see.", "ab cd.", lasting, 0.3, 9.0) == [("Ah", 0.1, 0.3), ("see.", 0.35, 0.85)]
    assert placed("Ah see.", "ab cd.", lasting, 0.45, 1.0) == [("Ah", 0.0, 0.15), ("see.", 0.2, 0.55)]


def test_one_more_output():
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node("Clip", ["x"], [LASTING])
    more = onnx.helper.make_node("Neg", [LASTING], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy")
    model = onnx.helper.make_model(onnx.helper.make_graph([node, more], "g", [x], [y]))
    told = onnx.load_from_string(telling(model.SerializeToString())).graph
    assert [one.name for one in told.output] == ["y", LASTING] and len(told.node) == 2


def test_another_network(tmp_path):
    pytest.importorskip("onnxruntime")

    class Other:
        model_path = tmp_path / "other.onnx"

    Other.model_path.write_bytes(b"")
    with pytest.raises(InputError, match=r"other.onnx tells no times of words; mm wants hibari-tts 0.2.1"):
        word_times(Other(), ["Hello."])
