"""Small frozen TensorFlow graphs that stand for MTG's label models.

They have the tensor names and shapes of the real ones, so essentia runs them. The embedder takes
the mean of each mel band over a patch; heads are `sigmoid(gain * embedding[:, :classes] + bias)`.
A GraphDef is written by hand (tensorflow/core/framework/*.proto): there is no TensorFlow here.
"""

import struct

import numpy as np

from audiocraft.data.labels import EMBEDDING, model_paths

MELS, PATCH, BATCH = 96, 128, 64
CLASSES = {"genre": 400, "moods": 56, "instrument": 40}

_FLOAT, _INT32 = 1, 3  # DataType
_TYPE, _SHAPE, _TENSOR = 6, 7, 8  # fields of AttrValue


def _varint(number):
    number &= (1 << 64) - 1  # -1 in a shape
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*digits, number])


def _field(number, value):
    """A field of a message: an integer, or what has a length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _node(name, operation, *inputs, **attributes):
    node = _field(1, name) + _field(2, operation) + b"".join(_field(3, i) for i in inputs)
    for key, value in attributes.items():
        node += _field(5, _field(1, key) + _field(2, value))
    return _field(1, node)


def _type(kind):
    return _field(_TYPE, kind)


def _shape(*sizes):
    return b"".join(_field(2, _field(1, size)) for size in sizes)


def _constant(name, values):
    values = np.asarray(values)
    kind = _FLOAT if values.dtype.kind == "f" else _INT32
    content = values.astype({_FLOAT: "<f4", _INT32: "<i4"}[kind]).tobytes()
    tensor = _field(1, kind) + _field(2, _shape(*values.shape)) + _field(4, content)
    return _node(name, "Const", dtype=_type(kind), value=_field(_TENSOR, tensor))


def _placeholder(name, *sizes):
    return _node(name, "Placeholder", dtype=_type(_FLOAT), shape=_field(_SHAPE, _shape(*sizes)))


def _slice(name, source, width):
    return (
        _constant(f"{name}/begin", [0, 0])
        + _constant(f"{name}/size", [-1, width])
        + _node(
            name,
            "Slice",
            source,
            f"{name}/begin",
            f"{name}/size",
            T=_type(_FLOAT),
            Index=_type(_INT32),
        )
    )


def embedder():
    """Output 1, (64, 1280), repeats the 96 means of a patch; output 0 has the first 400 of them."""
    types = b"".join(struct.pack("BB", _TYPE << 3, _FLOAT) for _ in range(2))
    return (
        _placeholder("serving_default_melspectrogram", BATCH, PATCH, MELS)
        + _constant("axis", [1])
        + _node(
            "means",
            "Mean",
            "serving_default_melspectrogram",
            "axis",
            T=_type(_FLOAT),
            Tidx=_type(_INT32),
        )
        + _constant("times", [1, -(-EMBEDDING // MELS)])
        + _node("tiled", "Tile", "means", "times", T=_type(_FLOAT), Tmultiples=_type(_INT32))
        + _slice("embedding", "tiled", EMBEDDING)
        + _slice("classes", "tiled", CLASSES["genre"])
        + _node("PartitionedCall", "IdentityN", "classes", "embedding", T=_field(1, types))
    )


def head(field, gain, bias, width=EMBEDDING):
    """A head; `gain` and `bias` have one number for each class, `width` may be -1 for any."""
    genre = field == "genre"
    source = "serving_default_model_Placeholder" if genre else "model/Placeholder"
    output = "PartitionedCall" if genre else "model/Sigmoid"
    return (
        _placeholder(source, -1, width)
        + _slice("first", source, len(bias))
        + _constant("gain", np.asarray(gain, np.float32))
        + _constant("bias", np.asarray(bias, np.float32))
        + _node("scaled", "Mul", "first", "gain", T=_type(_FLOAT))
        + _node("logits", "Add", "scaled", "bias", T=_type(_FLOAT))
        + _node(output, "Sigmoid", "logits", T=_type(_FLOAT))
    )


def write_models(folder, gains, biases):
    """Write all four models where `labels.model_paths` looks for them.

    `gains` and `biases` hold one number for each class, by field of `Labels`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in model_paths(folder).items():
        graph = embedder() if name == "embedder" else head(name, gains[name], biases[name])
        path.write_bytes(graph)
    return folder
