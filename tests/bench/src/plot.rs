//! A figure as a picture: bars with their quartiles and runs, a waterfall of stages, or bars that are stacked from parts.

use anyhow::anyhow;
use plotters::{
    coord::{Shift, types::RangedCoordf64},
    prelude::*,
};

use crate::figure::{Figure, Plot, Row};

const WIDTH: u32 = 900;
const ROW: u32 = 44;
const AXIS: u32 = 60;
const NAMES: u32 = 270;
const OURS: RGBColor = RGBColor(31, 98, 160);
const PEER: RGBColor = RGBColor(150, 150, 150);
/// Of parts that are stacked, in turn: told apart by eyes that see no red or no green as well.
const PARTS: [RGBColor; 8] = [
    RGBColor(31, 98, 160),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
    RGBColor(240, 228, 66),
    RGBColor(120, 120, 120),
];
const LABEL: (&str, i32) = ("sans-serif", 14);
/// Width of a letter of a label, about.
const LETTER: u32 = 8;

type Done = Result<(), Box<dyn std::error::Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// A bar of a picture.
struct Bar<'a> {
    row: &'a Row,
    /// Which line it stands in, from the top.
    line: usize,
    begin: f64,
    color: RGBColor,
}

/// The picture as SVG; nothing for a figure without samples.
pub fn svg(figure: &Figure) -> anyhow::Result<String> {
    let (lines, bars) = match figure.plot {
        Plot::Bars => plain(figure),
        Plot::Waterfall => waterfall(figure),
        Plot::Stacked => stacked(figure),
    };
    let ends = bars.iter().flat_map(|bar| {
        let samples = bar.row.samples.iter().copied();
        let most = match figure.plot {
            Plot::Bars => samples.fold(0.0, f64::max),
            _ => median(bar.row),
        };
        [bar.begin + most]
    });
    let most = ends.fold(0.0, f64::max);
    if most <= 0.0 {
        return Ok(String::new());
    }
    let mut text = String::new();
    draw(figure, &lines, &bars, most, &mut text)
        .map_err(|error| anyhow!("plot {}: {error}", figure.id))?;
    Ok(text)
}

fn plain(figure: &Figure) -> (Vec<String>, Vec<Bar<'_>>) {
    let color = |row: &Row| match row.name.starts_with("bulkhead") {
        true => OURS,
        false => PEER,
    };
    one_a_line(figure, |row, _| (0.0, color(row)))
}

fn waterfall(figure: &Figure) -> (Vec<String>, Vec<Bar<'_>>) {
    let mut ends: Vec<(&str, f64)> = Vec::new();
    let mut begins = Vec::new();
    for row in &figure.rows {
        let begin = match row.after {
            Some(name) => ends.iter().find(|(found, _)| *found == name),
            None => ends.last(),
        };
        let begin = begin.map_or(0.0, |(_, end)| *end);
        ends.push((&row.name, begin + median(row)));
        begins.push(begin);
    }
    one_a_line(figure, |_, line| {
        (begins.get(line).copied().unwrap_or(0.0), OURS)
    })
}

fn one_a_line(
    figure: &Figure,
    of: impl Fn(&Row, usize) -> (f64, RGBColor),
) -> (Vec<String>, Vec<Bar<'_>>) {
    let names = figure.rows.iter().map(|row| row.name.clone()).collect();
    let bars = figure.rows.iter().enumerate().map(|(line, row)| {
        let (begin, color) = of(row, line);
        Bar {
            row,
            line,
            begin,
            color,
        }
    });
    (names, bars.collect())
}

fn stacked(figure: &Figure) -> (Vec<String>, Vec<Bar<'_>>) {
    let mut lines: Vec<String> = Vec::new();
    let mut parts: Vec<&str> = Vec::new();
    let (mut bars, mut begin) = (Vec::new(), 0.0);
    for row in &figure.rows {
        let Some((whole, part)) = row.name.split_once(PART) else {
            continue;
        };
        if lines.last().is_none_or(|line| line != whole) {
            lines.push(whole.to_owned());
            begin = 0.0;
        }
        let known = parts.iter().position(|known| *known == part);
        let at = known.unwrap_or_else(|| {
            parts.push(part);
            parts.len() - 1
        });
        bars.push(Bar {
            row,
            line: lines.len() - 1,
            begin,
            color: PARTS.get(at % PARTS.len()).copied().unwrap_or(PEER),
        });
        begin += median(row);
    }
    (lines, bars)
}

/// Between a subject and its part.
pub const PART: &str = ": ";

fn median(row: &Row) -> f64 {
    row.spread.map_or(0.0, |spread| spread.median)
}

fn draw(figure: &Figure, lines: &[String], bars: &[Bar<'_>], most: f64, text: &mut String) -> Done {
    let keys = if figure.plot == Plot::Stacked {
        2 * ROW
    } else {
        0
    };
    let height = AXIS + keys + ROW * u32::try_from(lines.len())?;
    let area = SVGBackend::with_string(text, (WIDTH, height)).into_drawing_area();
    let (legend, plot) = area.split_vertically(keys);
    let top = lines.len() as f64;
    let mut chart = ChartBuilder::on(&plot)
        .margin(8)
        .margin_right(24)
        .x_label_area_size(36)
        .y_label_area_size(NAMES)
        .build_cartesian_2d(0.0..most * 1.05, 0.0..top)?;
    // A label stands in the middle of its row.
    let name = |place: &f64| {
        let line = lines.get((top - place) as usize);
        line.filter(|_| place.fract() != 0.0)
            .map_or(String::new(), Clone::clone)
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .x_desc(figure.unit)
        .y_labels(lines.len().saturating_mul(2).saturating_add(1))
        .y_label_formatter(&name)
        .label_style(LABEL)
        .draw()?;
    for bar in bars {
        draw_bar(&mut chart, bar, top, figure.plot)?;
    }
    if figure.plot == Plot::Stacked {
        draw_legend(&legend, bars)?;
    }
    area.present()?;
    Ok(())
}

fn draw_bar(chart: &mut Chart<'_, '_>, bar: &Bar<'_>, top: f64, plot: Plot) -> Done {
    let Some(spread) = bar.row.spread else {
        return Ok(());
    };
    let line = bar.line as f64;
    let (low, high) = (top - line - 0.85, top - line - 0.15);
    let middle = (low + high) / 2.0;
    let end = bar.begin + spread.median;
    let body = Rectangle::new([(bar.begin, low), (end, high)], bar.color.mix(0.7).filled());
    chart.draw_series([body])?;
    if plot == Plot::Bars {
        let quartiles = [(spread.q1, middle), (spread.q3, middle)];
        chart.draw_series([Rectangle::new(quartiles, BLACK.stroke_width(2))])?;
        let runs = bar.row.samples.iter();
        chart.draw_series(
            runs.map(|&sample| Circle::new((sample, middle), 2, BLACK.mix(0.5).filled())),
        )?;
    }
    Ok(())
}

/// Each part's color, once.
fn draw_legend(area: &Area<'_>, bars: &[Bar<'_>]) -> Done {
    let mut seen: Vec<&str> = Vec::new();
    let (mut x, mut y) = (16, 14);
    for bar in bars {
        let part = bar.row.name.split_once(PART).map_or("", |(_, part)| part);
        if seen.contains(&part) {
            continue;
        }
        seen.push(part);
        let width = 44 + i32::try_from(u32::try_from(part.len())? * LETTER)?;
        if x + width > i32::try_from(WIDTH)? {
            (x, y) = (16, y + 24);
        }
        let square = [(x, y), (x + 14, y + 14)];
        area.draw(&Rectangle::new(square, bar.color.mix(0.7).filled()))?;
        area.draw(&Text::new(part.to_owned(), (x + 20, y), LABEL))?;
        x += width;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_follow_one_another_and_parts_lie_on_one_another() {
        let mut figure = Figure::new("a::b", "", "ms").drawn(Plot::Waterfall);
        for (name, ms) in [("a", 1.0), ("beside", 5.0), ("b", 2.0)] {
            figure.add_part(name, vec![ms]);
        }
        figure.rows[2].after = Some("a");
        let begins: Vec<f64> = waterfall(&figure).1.iter().map(|bar| bar.begin).collect();
        assert_eq!(begins, [0.0, 1.0, 1.0]);

        let mut figure = Figure::new("a::b", "", "MiB").drawn(Plot::Stacked);
        for name in ["one", "one: x", "one: y", "two: y"] {
            figure.add_part(name, vec![1.0]);
        }
        let (lines, bars) = stacked(&figure);
        assert_eq!(lines, ["one", "two"]);
        let begins: Vec<f64> = bars.iter().map(|bar| bar.begin).collect();
        assert_eq!(begins, [0.0, 1.0, 0.0]);
        assert_eq!(bars[1].color, bars[2].color);
        assert!(svg(&figure).unwrap().contains("<svg"));
    }
}
