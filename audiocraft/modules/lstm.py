"""LSTM over frames, with the input added to its output."""

from dataclasses import dataclass

from torch import Tensor, nn


class StreamableLSTM(nn.Module):
    """Several LSTM layers over (B, C, T) with a skip connection.

    Args:
        dimension: channels.
        num_layers: LSTM layers.
    """

    def __init__(self, dimension: int, num_layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(dimension, dimension, num_layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, C, T)."""
        y: Tensor = self.lstm(x.permute(2, 0, 1))[0]
        return y.permute(1, 2, 0) + x

    def stream(self) -> "LSTMStream":
        """The LSTM at the beginning of an input."""
        return LSTMStream(self.lstm)


@dataclass
class LSTMStream:
    """An LSTM on its way through one input.

    Attributes:
        lstm: the LSTM.
        state: hidden and cell state of each layer, (layers, B, C) both.
    """

    lstm: nn.LSTM
    state: tuple[Tensor, Tensor] | None = None

    def push(self, x: Tensor, last: bool) -> Tensor:  # noqa: ARG002 - all output is final
        """Hear the next piece; see `Stream`."""
        if x.shape[-1] == 0:
            return x
        y, self.state = self.lstm(x.permute(2, 0, 1), self.state)
        out: Tensor = y.permute(1, 2, 0) + x
        return out
