"""Figures: controls hold every combination, `show` publishes JSON with a description, predictions draw the guess."""

from __future__ import annotations

import json

import plotly.graph_objects as go
import pytest

import lcx
from lcx.figures import COLORS, controls, display, figure
from lcx.figures.display import MIME

ALT = "A line that rises from zero to twenty."


@pytest.fixture
def published(monkeypatch):
    """What `show` hands to the front end, in order."""
    import IPython.display

    outputs = []
    monkeypatch.setattr(IPython.display, "display", lambda data, **kw: outputs.append(data))
    monkeypatch.setenv("LCX_STATIC", "1")
    return outputs


def moving(values=None, **kw) -> go.Figure:
    fig = figure(go.Scatter(x=[0, 1], y=[0, 1]), go.Scatter(x=[0, 1], y=[5, 5]), xaxis_title="x")
    values = values or {"slope": [1, 2, 3], "kind": ["up", "down"]}

    def update(slope=1, kind="up"):
        return {
            "data": [{"y": [0, slope if kind == "up" else -slope]}],
            "layout": {"title": {"text": f"{kind} {slope}"}},
        }

    return controls(fig, values, update, **kw)


def test_figure_leaves_colours_to_the_page():
    layout = figure(go.Scatter(y=[1])).to_plotly_json()["layout"]
    assert "paper_bgcolor" not in layout and "plot_bgcolor" not in layout and "color" not in layout["font"]
    assert tuple(layout["colorway"]) == COLORS and len(set(COLORS)) == len(COLORS)


def test_controls_compute_every_combination():
    fig = moving(start={"slope": 2, "kind": "down"})
    assert [f.name for f in fig.frames] == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]
    assert [tuple(f.data[0].y) for f in fig.frames] == [(0, 1), (0, -1), (0, 2), (0, -2), (0, 3), (0, -3)]
    assert tuple(fig.data[0].y) == (0, -2) and tuple(fig.data[1].y) == (5, 5), "the figure shows its start"
    assert fig.layout.title.text == "down 2"
    slope, kind = fig.layout.meta["controls"]
    assert (slope["kind"], slope["values"], slope["start"]) == ("slider", ["1", "2", "3"], 1)
    assert (kind["kind"], kind["values"], kind["start"]) == ("choice", ["up", "down"], 1)
    assert not fig.layout.sliders, "several controls have no native slider"


def test_one_control_has_a_native_slider_for_notebooks():
    fig = moving({"slope": [1000, 2000]}, play=True)
    assert [s.label for s in fig.layout.sliders[0].steps] == ["1,000", "2,000"]
    assert [s.args[0][0] for s in fig.layout.sliders[0].steps] == [f.name for f in fig.frames]
    assert [b.label for b in fig.layout.updatemenus[0].buttons] == ["Play", "Pause"]


@pytest.mark.parametrize("values", [{"slope": []}, {"slope": list(range(2001))}])
def test_controls_refuse_none_and_too_many(values):
    with pytest.raises(ValueError, match="combinations"):
        moving(values)


def test_show_publishes_the_figure_and_its_words(published):
    lcx.show(moving(), alt=f"  {ALT}\n ")
    [out] = published
    spec = out[MIME]
    assert spec["layout"]["meta"]["alt"] == ALT and out["text/plain"] == f"[figure: {ALT}]"
    assert spec["config"] == {"responsive": True, "displaylogo": False, "showSendToCloud": False}
    assert len(spec["frames"]) == 6 and json.dumps(spec)


def test_show_changes_no_figure_it_is_given(published):
    fig = moving()
    before = fig.to_json()
    lcx.show(fig, alt=ALT, predict=lcx.Predict("How steep?", truth=2, low=1, high=3, guess=1.5))
    assert fig.to_json() == before


@pytest.mark.parametrize(
    "make, words, message",
    [
        (lambda: figure(go.Scatter(y=[1])), "short", "say in a sentence"),
        (lambda: figure(go.Scatter(y=[1]), title="costs 5 $"), ALT, "dollar"),
        (lambda: figure(go.Scatter(y=[i / 7 for i in range(40_000)])), ALT, "limit is 300,000"),
    ],
)
def test_show_refuses(published, make, words, message):
    with pytest.raises(ValueError, match=message):
        lcx.show(make(), alt=words)
    assert not published


@pytest.mark.parametrize("axis, ends", [("x", ("x0", "x1")), ("y", ("y0", "y1"))])
def test_guess_is_drawn_where_it_belongs(published, axis, ends):
    guess = lcx.Predict(
        "How long?", truth=4096, low=1024, high=65536, axis=axis, unit="tokens", log=True, guess=2000
    )
    lcx.show(figure(go.Scatter(x=[1, 10], y=[1, 2])), alt=ALT, predict=guess)
    spec = published[0][MIME]
    [line] = spec["layout"]["shapes"]
    assert [line[e] for e in ends] == [2000, 2000] and line["label"]["text"] == "your guess: 2,000 tokens"
    assert spec["layout"]["meta"]["predict"]["truth"] == 4096
    published.clear()
    lcx.show(
        figure(go.Scatter(x=[1, 10], y=[1, 2])), alt=ALT, predict=lcx.Predict("?", truth=1, low=0, high=2)
    )
    assert "shapes" not in published[0][MIME]["layout"], "no guess, no line"


@pytest.mark.parametrize(
    "wrong", [{"low": 2, "high": 1}, {"low": 0, "high": 1, "log": True}, {"low": 0, "high": 1, "axis": "z"}]
)
def test_predict_refuses(wrong):
    with pytest.raises(ValueError, match="Predict"):
        lcx.Predict("?", truth=1, **wrong)


def test_live_explorer_shows_the_frame_its_widgets_ask_for(monkeypatch):
    shown, boxes = [], []
    import IPython.display

    monkeypatch.setattr(display, "_publish", lambda fig, alt: shown.append((fig, alt)))
    monkeypatch.setattr(IPython.display, "display", boxes.append)
    monkeypatch.delenv("LCX_STATIC", raising=False)
    lcx.show(moving(), alt=ALT)
    slope, kind, _ = boxes[0].children
    assert tuple(shown[-1][0].data[0].y) == (0, 1)
    slope.value = 2
    kind.value = 1
    fig, alt = shown[-1]
    assert tuple(fig.data[0].y) == (0, -3) and tuple(fig.data[1].y) == (5, 5)
    assert fig.layout.title.text == "down 3" and alt == ALT


def test_page_html_cannot_be_broken_out_of():
    from lcx.book_ext import figure_html

    spec = {
        "data": [{"name": "</script><b>"}],
        "layout": {"meta": {"alt": '<"quotes"> & more'}, "height": 300},
    }
    html = figure_html(spec)
    payload = html.split('<script type="application/json">')[1].split("</script>")[0]
    assert json.loads(payload) == spec and "<b>" not in html
    assert "&lt;&quot;quotes&quot;&gt; &amp; more</figcaption>" in html and "300px" in html
