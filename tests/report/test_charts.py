"""Charts of the report: their frame, their ticks, their legend."""

from simmim.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, chart, ticks


def test_the_legend_has_the_last_value_where_the_curve_ends_in_a_mean() -> None:
    drawn = chart("loss", [("run", [(step, float(step)) for step in range(1000)])])
    assert drawn is not None
    assert drawn.lines[0].summary == 999


def test_charts_keep_to_their_frame_and_ticks_are_round() -> None:
    drawn = chart("x", [("a", [(1, 0.001), (5, 10.0)]), ("empty", [])], logarithmic=True)
    assert drawn is not None and drawn.logarithmic and len(drawn.lines) == 1
    places = [tuple(map(float, place.split(","))) for place in drawn.path(drawn.lines[0]).split()]
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in places)
    assert places[0][1] > places[1][1]
    assert chart("x", [("a", [])]) is None
    assert not chart("x", [("a", [(1, 0.0), (2, 1.0)])], logarithmic=True).logarithmic  # type: ignore[union-attr]
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(3, 3) == [3]
    assert [round(tick, 6) for tick in ticks(0.11, 0.52)] == [0.2, 0.3, 0.4, 0.5]
    assert ticks(1, 2, most=6, least=1) == [1, 2]
    flat = chart("x", [("a", [(1, 4.46), (2, 4.71)])], logarithmic=True)
    assert flat is not None and [text for _, text in flat.value_ticks] == ["4.5", "4.6", "4.7"]
