"""Figures: one idea each. A function here or in a sibling file returns a Plotly figure; `show` publishes it.

The same figure lives three lives: in JupyterLab and Colab it is an ordinary Plotly figure, in the built page it is
drawn from its JSON by one local plotly.js with real HTML sliders, and for a screen reader it is `alt` and a table.
"""

from .base import COLORS, SEQUENTIAL, controls, figure
from .display import Predict, show

__all__ = ["COLORS", "SEQUENTIAL", "Predict", "controls", "figure", "show"]
