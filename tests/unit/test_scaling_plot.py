"""The picture of how asynchronous training scales: nothing of it is cut off."""

import pytest

from lightning_accel.evidence import scaling_plot
from lightning_accel.evidence.scaling_plot import Curve, plot_scaling

NAMES = ("look_ahead", "inverse", "staleness=none", "delay_compensation", "drop beyond 16", "inverse, max_staleness=1",
         "local_steps=16", "local_steps=16, Nesterov", "local_steps=16, rounds", "DDP")  # fmt: skip


@pytest.mark.parametrize("accuracy", [{}, {2: 0.9, 8: 0.8}])
def test_the_legend_fits_beside_one_panel_and_beside_two(tmp_path, monkeypatch, accuracy):
    drawn = []
    monkeypatch.setattr(scaling_plot, "save_for_page", lambda figure, path: drawn.append(figure))
    curves = {name: Curve(throughput={2: 10.0, 8: 30.0}, accuracy=accuracy) for name in NAMES}
    plot_scaling(curves, tmp_path / "a.png", conclusion="One sentence.", what="digits", ideal={2: 20.0, 8: 80.0})
    (figure,) = drawn
    figure.draw_without_rendering()
    legend, page = figure.legends[0].get_window_extent(), figure.bbox
    assert page.x0 <= legend.x0
    assert legend.x1 <= page.x1
