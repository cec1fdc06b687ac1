//! The report: `results.json`, `results.md`, and `report.html`, which needs no other file.

use std::{fmt::Write, fs, path::Path};

use anyhow::Context;
use serde_json::json;

use crate::{
    figure::{Figure, Row},
    host::Host,
    plot,
    stats::Spread,
    subject::{RUNC, RUNC_AGAIN},
};

const STYLE: &str = "body{font:15px/1.5 sans-serif;max-width:64em;margin:2em auto;padding:0 1em;color:#222}\
    table{border-collapse:collapse;margin:.5em 0 1em}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}\
    td:first-child,th:first-child,.host td{text-align:left}svg{max-width:100%;height:auto}h2{margin-top:2em}.missing{color:#a33}";

/// Writes the three files.
pub fn write(folder: &Path, host: &Host, figures: &[Figure]) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let results = json!({
        "host": host.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
        "figures": figures,
    });
    let files = [
        ("results.json", serde_json::to_string_pretty(&results)?),
        ("results.md", markdown(host, figures)),
        ("report.html", html(host, figures)?),
    ];
    for (name, text) in files {
        let file = folder.join(name);
        fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

/// Says what was measured and where the report is.
pub fn tell(folder: &Path, figures: &[Figure]) {
    for figure in figures {
        for row in &figure.rows {
            let [name, value, ratio] = cells(row);
            let by = if ratio.is_empty() { "" } else { ", × runc " };
            println!("{}: {name}: {value} {}{by}{ratio}", figure.id, figure.unit);
        }
        for line in &figure.missing {
            println!("{}: not measured: {line}", figure.id);
        }
    }
    println!("{}", folder.join("report.html").display());
}

fn markdown(host: &Host, figures: &[Figure]) -> String {
    let mut text = String::from("# Benchmark\n\n| | |\n|---|---|\n");
    for (name, value) in host {
        let _ = writeln!(text, "| {name} | {value} |");
    }
    let lines = short(figures);
    if !lines.is_empty() {
        let head = SHORT.join(" | ");
        let _ = writeln!(
            text,
            "\n## In short\n\n| | {head} |\n|---|---:|---:|---:|---:|"
        );
    }
    for cells in lines {
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    let _ = writeln!(text, "\n{READING}");
    for figure in figures {
        let _ = write!(
            text,
            "\n## {}: {}\n\n{}, {} is better; median (quartiles)\n\n| | {} | × runc |\n|---|---:|---:|\n",
            figure.id,
            figure.title,
            figure.unit,
            better(figure),
            figure.unit
        );
        for row in &figure.rows {
            let [name, value, ratio] = cells(row);
            let _ = writeln!(text, "| {name} | {value} | {ratio} |");
        }
        for line in &figure.missing {
            let _ = writeln!(text, "\nNot measured: {line}");
        }
        for note in &figure.notes {
            let _ = writeln!(text, "\n```\n{note}```");
        }
    }
    text
}

fn html(host: &Host, figures: &[Figure]) -> anyhow::Result<String> {
    let mut text = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Bulkhead: benchmark</title><style>{STYLE}</style>\
         <h1>Bulkhead: benchmark</h1><table class=\"host\">"
    );
    for (name, value) in host {
        let _ = write!(text, "<tr><td>{name}</td><td>{}</td></tr>", escape(value));
    }
    text.push_str("</table>");
    let lines = short(figures);
    if !lines.is_empty() {
        let head = SHORT.map(|head| format!("<th>{head}</th>")).concat();
        let _ = write!(text, "<h2>In short</h2><table><tr><th></th>{head}</tr>");
        for cells in lines {
            let cells = cells.map(|cell| format!("<td>{}</td>", escape(&cell)));
            let _ = write!(text, "<tr>{}</tr>", cells.concat());
        }
        text.push_str("</table>");
    }
    let _ = write!(text, "<p>{}</p>", escape(READING));
    for figure in figures {
        let _ = write!(
            text,
            "<h2>{}</h2><p>{}; {}, {} is better</p>{}",
            escape(&figure.id),
            escape(&figure.title),
            figure.unit,
            better(figure),
            plot::svg(figure)?
        );
        if !figure.rows.is_empty() {
            let head = "<table><tr><th></th><th>";
            let _ = write!(text, "{head}{}</th><th>× runc</th></tr>", figure.unit);
        }
        for row in &figure.rows {
            let cells = cells(row).map(|cell| format!("<td>{}</td>", escape(&cell)));
            let _ = write!(text, "<tr>{}</tr>", cells.concat());
        }
        if !figure.rows.is_empty() {
            text.push_str("</table>");
        }
        for line in &figure.missing {
            let _ = write!(
                text,
                "<p class=\"missing\">Not measured: {}</p>",
                escape(line)
            );
        }
        for note in &figure.notes {
            let _ = write!(
                text,
                "<details><summary>In detail</summary><pre>{}</pre></details>",
                escape(note)
            );
        }
    }
    text.push_str("</html>\n");
    Ok(text)
}

const SHORT: [&str; 4] = ["runc", "Bulkhead", "× runc", "noise"];
const READING: &str = "Medians; × runc is the median of the ratios of one round, in which all subjects took turns. Noise is how far a second \
    runc is from the first: a ratio that differs from 1 by no more says nothing. In pictures, bars are medians, lines reach from the first to the third \
    quartile, dots are runs.";

/// A line for each figure that has runc and Bulkhead.
fn short(figures: &[Figure]) -> Vec<[String; 5]> {
    let lines = figures.iter().filter_map(|figure| {
        let row = |name: &str| figure.rows.iter().find(|row| row.name == name);
        let runc = row(RUNC.name)?.spread?;
        let ours = figure
            .rows
            .iter()
            .find(|row| row.name.starts_with("bulkhead"))?;
        let ratio = ours.to_runc?.median;
        let again = row(RUNC_AGAIN.name).and_then(|row| row.to_runc);
        let value = |spread: Spread| {
            format!(
                "{:.*} {}",
                digits(spread.median),
                spread.median,
                figure.unit
            )
        };
        Some([
            figure.id.clone(),
            value(runc),
            value(ours.spread?),
            format!("{ratio:.2}"),
            again.map_or("not known".into(), |again| {
                format!("{:.0} %", (again.median - 1.0).abs() * 100.0)
            }),
        ])
    });
    lines.collect()
}

fn better(figure: &Figure) -> &'static str {
    if figure.more_is_better {
        "more"
    } else {
        "less"
    }
}

fn cells(row: &Row) -> [String; 3] {
    [
        row.name.clone(),
        row.spread.map_or("none".into(), number),
        row.to_runc
            .map_or(String::new(), |spread| format!("{:.2}", spread.median)),
    ]
}

fn number(spread: Spread) -> String {
    let digits = digits(spread.median);
    if spread.q1 == spread.q3 {
        return format!("{:.digits$}", spread.median);
    }
    format!(
        "{:.digits$} ({:.digits$} to {:.digits$})",
        spread.median, spread.q1, spread.q3
    )
}

/// Decimals of a value, so that three figures or so are shown.
fn digits(value: f64) -> usize {
    match value {
        small if small < 10.0 => 2,
        middle if middle < 200.0 => 1,
        _ => 0,
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_measured_is_said_and_no_text_becomes_markup() {
        let mut figure = Figure::new("start::one", "a <b> c", "ms");
        figure.add("runc", vec![10.0, 20.0, 30.0]);
        figure.add("other", vec![5.0, 10.0, 15.0]);
        figure.missing.push("crun: <none>".into());
        let host = vec![("CPU", "2 < 3".to_owned())];
        let page = html(&host, std::slice::from_ref(&figure)).unwrap();
        assert!(page.contains("a &lt;b&gt; c") && page.contains("crun: &lt;none&gt;"));
        assert!(page.contains("<svg"));
        // Without Bulkhead there is nothing in short.
        assert!(!page.contains("not known"));
        let table = markdown(&host, &[figure]);
        assert!(
            table.contains("| other | 10.0 (7.5 to 12.5) | 0.50 |"),
            "{table}"
        );
        assert!(table.contains("Not measured: crun"));
    }
}
