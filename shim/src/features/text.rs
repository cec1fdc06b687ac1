//! The table of fields for people.

use std::fmt::Write;

use bulkhead_protocol::{
    features::{OCI_VERSION_MAX, OCI_VERSION_MIN},
    fields::{FIELDS, Field, Status},
};

/// Columns of a line on a terminal.
const WIDTH: usize = 100;
/// Columns before the last one: two spaces, the name, the status.
const NAME: usize = 18;
const STATUS: usize = 15;

/// `181 fields of the OCI runtime specification (1.0.0 to 1.3.0)` and `119 enforced, …`.
fn counts() -> (String, String) {
    let counts: Vec<String> = Status::ALL
        .iter()
        .map(|&status| {
            let count = FIELDS.iter().filter(|f| f.status == status).count();
            format!("{count} {status}")
        })
        .collect();
    let all = format!(
        "{} fields of the OCI runtime specification ({OCI_VERSION_MIN} to {OCI_VERSION_MAX})",
        FIELDS.len()
    );
    (all, counts.join(", "))
}

/// The objects of a spec with their fields, in the order in which they begin.
fn objects() -> Vec<(&'static str, Vec<&'static Field>)> {
    let mut objects: Vec<(&str, Vec<&Field>)> = Vec::new();
    for field in FIELDS {
        let (object, _) = split(field);
        match objects.iter_mut().find(|(name, _)| *name == object) {
            Some((_, fields)) => fields.push(field),
            None => objects.push((object, vec![field])),
        }
    }
    objects
}

/// The object that a field is in, and its name there.
fn split(field: &Field) -> (&'static str, &'static str) {
    field.path.rsplit_once('.').unwrap_or(("", field.path))
}

/// Counts and table, for a terminal.
pub fn terminal() -> String {
    let (all, counts) = counts();
    let mut text = format!("{all}:\n{counts}\n");
    for (object, fields) in objects() {
        let _ = write!(text, "\n{}\n", title(object));
        for field in fields {
            line(&mut text, field);
        }
    }
    text
}

fn title(object: &str) -> &str {
    match object {
        "" => "config.json",
        object => object,
    }
}

/// One field; what does not fit into the line goes on below, in the last column.
fn line(text: &mut String, field: &Field) {
    let (_, name) = split(field);
    let mut line = format!("  {name:NAME$} {:STATUS$}", field.status);
    for word in field.how.split(' ') {
        if line.len() + word.len() > WIDTH {
            text.push_str(line.trim_end());
            text.push('\n');
            line = " ".repeat(3 + NAME + STATUS);
        }
        line.push_str(word);
        line.push(' ');
    }
    text.push_str(line.trim_end());
    text.push('\n');
}

/// Counts and table as in `docs/oci-spec.md`.
pub fn markdown() -> String {
    let (all, counts) = counts();
    let mut text = format!("{all}: {counts}.\n");
    for (object, fields) in objects() {
        let _ = write!(
            text,
            "\n### {}\n\n| field | | how |\n|---|---|---|\n",
            title(object)
        );
        for field in fields {
            let _ = writeln!(
                text,
                "| `{}` | {} | {} |",
                split(field).1,
                field.status,
                field.how
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_the_table_of_this_build() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/oci-spec.md");
        let page = std::fs::read_to_string(page).unwrap();
        let (_, table) = page.split_once("## The table\n\n").unwrap();
        assert!(
            table == markdown(),
            "replace what is below \"## The table\" in docs/oci-spec.md by the output of `bulkhead features --markdown`"
        );
    }

    #[test]
    fn lines_fit_on_a_terminal_and_keep_every_word() {
        let text = terminal();
        assert!(text.lines().all(|line| line.len() <= WIDTH), "{text}");
        for field in FIELDS {
            for word in field.how.split_whitespace() {
                assert!(text.contains(word), "{word}");
            }
            assert!(split(field).1.len() <= NAME, "{}", field.path);
        }
    }
}
