"""Live versions of figures with several controls, for a running kernel only."""

from __future__ import annotations

import plotly.graph_objects as go


def explore(fig: go.Figure) -> None:
    """Show `fig` (made by `figures.controls`) under ipywidgets that pick among its precomputed frames."""
    import ipywidgets as w
    from IPython.display import display

    from .figures.display import _publish

    frames = {f.name: f for f in fig.frames}
    boxes = []
    for c in fig.layout.meta["controls"]:
        make = w.SelectionSlider if c["kind"] == "slider" else w.Dropdown
        options = [(label, i) for i, label in enumerate(c["values"])]
        boxes.append(
            make(
                options=options,
                value=c["start"],
                description=c["name"],
                style={"description_width": "initial"},
            )
        )
    out = w.Output()

    def draw(_=None):
        frame = frames[".".join(str(b.value) for b in boxes)]
        now = go.Figure(data=fig.data, layout=fig.layout)
        for trace, change in zip(now.data, frame.data, strict=False):
            trace.update({k: v for k, v in change.to_plotly_json().items() if k != "type"})
        if frame.layout:
            now.update_layout(frame.layout.to_plotly_json())
        out.clear_output(wait=True)
        with out:
            _publish(now, fig.layout.meta["alt"])

    for b in boxes:
        b.observe(draw, "value")
    draw()
    display(w.VBox([*boxes, out]))
