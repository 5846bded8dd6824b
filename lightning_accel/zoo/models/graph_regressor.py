"""Regression of a number on a sequence with a recurrent network given as a graph."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from lightning_accel.recurrent.graph_rnn import GraphRNN
from lightning_accel.zoo.models.optimization import OptimizerName, ScheduleName
from lightning_accel.zoo.models.recurrent_regressor import RecurrentRegressor


class GraphRegressor(RecurrentRegressor):
    """Predict one number from the last output of a `GraphRNN`, under the mean squared error.

    Args:
        nodes: See `GraphRNN`.
        edges: See `GraphRNN`.
        inputs: See `GraphRNN`.
        outputs: See `GraphRNN`.
        tolerance: Largest absolute error of a prediction that counts as right, in units of the target.
        lr: Learning rate after warm-up.
        optimizer: ``"sgd"`` has Nesterov momentum 0.9.
        weight_decay: Of every parameter.
        schedule: Of the learning rate, a step at a time, to 0 at the Trainer's last step unless ``"constant"``.
        warmup_steps: Optimizer steps of linear warm-up.

    Raises:
        ValueError: If the graph can not be computed or an argument is out of range.
    """

    def __init__(
        self,
        *,
        nodes: Mapping[str, Mapping[str, Any]],
        edges: Sequence[Mapping[str, Any] | str],
        inputs: Sequence[str],
        outputs: Sequence[str],
        tolerance: float = 0.04,
        lr: float = 5e-3,
        optimizer: OptimizerName = "adam",
        weight_decay: float = 0.0,
        schedule: ScheduleName = "constant",
        warmup_steps: int = 0,
    ) -> None:
        network = GraphRNN(nodes, edges, inputs, outputs)
        super().__init__(
            in_features=network.input_size,
            hidden_size=1,
            tolerance=tolerance,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup_steps=warmup_steps,
        )
        self.recurrent = _Outputs(network)  # type: ignore[assignment]  # another layer of the same use
        self.head = nn.Linear(network.output_size, 1)


class _Outputs(nn.Module):
    """Drop the final state."""

    def __init__(self, network: GraphRNN) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.network(x)[0])
