"""LSTM over frames, with the input added to its output."""

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
