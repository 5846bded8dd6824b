"""``plan`` of intra-stream scheduling."""

import xml.dom.minidom

import pytest
from cli_calls import call, folders

SCHEDULING = "callbacks=[intra_stream_scheduling]"
TEXTS = ["experiment=char_lm", "model.hidden_size=8", "data.batch_size=4", SCHEDULING]
SEQUENCES = ["data=adding", "data.length=12", "data.batch_size=4", SCHEDULING]


@pytest.mark.parametrize("schedule", ["auto", "intra_stream"])
def test_plan_measures_cells_that_are_called_in_a_loop(schedule, capsys):
    words = ["model.cell=layer_norm", f"callbacks.intra_stream_scheduling.schedule={schedule}"]
    assert call("plan", *TEXTS, *words) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("recurrent.stack.0: ")]
    assert "called in a loop, 128 times a step" in line
    assert "times as fast as the loop" in line if schedule == "auto" else line.endswith("intra_stream")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.cell=lstm"], "recurrent.stack: no packed call to speed up"),
        (
            ["model.cell=layer_norm", "callbacks.intra_stream_scheduling.schedule=loop"],
            "The plain loop everywhere: nothing would change.",
        ),
    ],
)
def test_plan_says_where_nothing_changes(words, expected, capsys):
    assert call("plan", *TEXTS, *words) == 0
    assert expected in capsys.readouterr().out


def test_plan_draws_the_schedule_of_a_graph(capsys):
    assert call("plan", "model=recurrent_graph/lstm", *SEQUENCES) == 0
    out = capsys.readouterr().out
    assert "recurrent.network.rnn: " in out
    assert (
        " 2. step by step, a step in this order, after 1\n      input_gate  = sigmoid(W x + W hidden[t-1] + b)" in out
    )
    assert "for all time steps at once: W x of input_gate, forget_gate, candidate, output_gate" in out
    (folder,) = folders("plan")
    drawing = xml.dom.minidom.parse(str(folder / "schedule_recurrent.network.rnn.svg"))
    assert "hidden" in {node.firstChild.data for node in drawing.getElementsByTagName("text")}


def test_plan_explains_that_there_is_no_recurrent_layer(capsys):
    assert call("plan", "model.width=16", "model.depth=1", "data=digits", SCHEDULING) == 2
    assert "finds no recurrent layer in MLP" in capsys.readouterr().err
