//! A figure as a picture: a bar a row, with its quartiles and its runs.

use anyhow::anyhow;
use plotters::prelude::*;

use crate::figure::Figure;

const WIDTH: u32 = 900;
const ROW: u32 = 44;
const AXIS: u32 = 60;
const OURS: RGBColor = RGBColor(31, 98, 160);
const PEER: RGBColor = RGBColor(150, 150, 150);

/// The picture as SVG; nothing for a figure without samples.
pub fn svg(figure: &Figure) -> anyhow::Result<String> {
    let samples = figure.rows.iter().flat_map(|row| &row.samples);
    let most = samples.copied().fold(0.0, f64::max);
    if most <= 0.0 {
        return Ok(String::new());
    }
    let mut text = String::new();
    draw(figure, most, &mut text).map_err(|error| anyhow!("plot {}: {error}", figure.id))?;
    Ok(text)
}

fn draw(figure: &Figure, most: f64, text: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let rows = figure.rows.len();
    let height = AXIS + ROW * u32::try_from(rows)?;
    let area = SVGBackend::with_string(text, (WIDTH, height)).into_drawing_area();
    let top = rows as f64;
    let mut chart = ChartBuilder::on(&area)
        .margin(8)
        .x_label_area_size(36)
        .y_label_area_size(250)
        .build_cartesian_2d(0.0..most * 1.05, 0.0..top)?;
    // A label stands in the middle of its row.
    let name = |place: &f64| {
        let row = figure.rows.get((top - place) as usize);
        row.filter(|_| place.fract() != 0.0)
            .map_or(String::new(), |row| row.name.clone())
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .x_desc(figure.unit)
        .y_labels(rows.saturating_mul(2).saturating_add(1))
        .y_label_formatter(&name)
        .label_style(("sans-serif", 14))
        .draw()?;
    for (index, row) in figure.rows.iter().enumerate() {
        let Some(spread) = row.spread else { continue };
        let (low, high) = (top - index as f64 - 0.85, top - index as f64 - 0.15);
        let middle = (low + high) / 2.0;
        let color = if row.name.starts_with("bulkhead") {
            OURS
        } else {
            PEER
        };
        chart.draw_series([
            Rectangle::new([(0.0, low), (spread.median, high)], color.mix(0.6).filled()),
            Rectangle::new(
                [(spread.q1, middle), (spread.q3, middle)],
                BLACK.stroke_width(2),
            ),
        ])?;
        chart.draw_series(
            row.samples
                .iter()
                .map(|&sample| Circle::new((sample, middle), 2, BLACK.mix(0.5).filled())),
        )?;
    }
    area.present()?;
    Ok(())
}
