//! Runs a case on both sides and says how it ended.

use bulkhead_harness::Outcome;
use serde_json::{Value, json};

use crate::{
    case::{Case, Expect},
    compare::{Difference, differences, missing},
    explained,
    host::Host,
    side::{End, Side, failed},
};

/// A difference and why it is right.
#[derive(Clone, Debug)]
pub struct Reason {
    /// Where, and what each side saw.
    pub difference: Difference,
    /// Why.
    pub why: String,
}

/// What a case that passed showed.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// Differences with their reasons.
    pub explained: Vec<Reason>,
    /// What each side saw or said, for the report.
    pub ours: String,
    /// As above.
    pub runc: String,
}

/// Runs and judges.
pub fn judge<'a>(case: &Case, host: &Host, ours: &Side<'a>, runc: &Side<'a>) -> Outcome<Verdict> {
    let alone = case.beyond.is_some_and(|when| host.is(when));
    ours.ensure_pod()?;
    if !alone {
        runc.ensure_pod()?;
    }
    let ends = run(case, ours, runc, alone);
    let dead: Vec<&str> = [ours, runc]
        .iter()
        .filter(|side| (!alone || side.is_ours()) && !side.pod_lives())
        .map(|side| side.kind.name())
        .collect();
    let (our_end, runc_end) = ends?;
    if !dead.is_empty() {
        return Err(failed(format!("the pod of {} ended", dead.join(" and "))));
    }
    let mut verdict = Verdict {
        ours: told(case, &our_end),
        runc: runc_end
            .as_ref()
            .map(|end| told(case, end))
            .unwrap_or_default(),
        ..Verdict::default()
    };
    match &case.expect {
        Expect::Survives => {}
        Expect::Refused(words) => {
            if our_end.started {
                return Err(failed(format!("Bulkhead runs it: {}", our_end.seen)));
            }
            said(&our_end, words)?;
            // A program that failed before its first word did not run either: runc sees some errors only at execve.
            let ran = |end: &End| {
                end.started && (end.seen["status"] == json!(0) || end.seen["view"] != json!(""))
            };
            if let Some(end) = runc_end.filter(ran) {
                return Err(failed(format!("runc runs it: {}", end.seen)));
            }
        }
        Expect::OursRefuses(field, reason) => {
            if our_end.started {
                return Err(failed(format!("Bulkhead runs it: {}", our_end.seen)));
            }
            said(&our_end, &[field])?;
            let difference = Difference {
                at: vec!["started".into()],
                ours: json!(false),
                runc: json!(runc_end.as_ref().is_some_and(|end| end.started)),
            };
            if difference.runc == json!(true) || alone {
                let why = explained::of_field(host, field)
                    .unwrap_or_else(|| format!("{field} is refused: {reason}"));
                verdict.explained.push(Reason { difference, why });
            }
        }
        Expect::RuncRefuses(reason) => {
            compare(case, host, &our_end, None, &mut verdict)?;
            if let Some(end) = runc_end.filter(|end| !end.started) {
                let difference = Difference {
                    at: vec!["started".into()],
                    ours: json!(true),
                    runc: json!(end.error),
                };
                verdict.explained.push(Reason {
                    difference,
                    why: (*reason).into(),
                });
            }
        }
        Expect::Runs => compare(case, host, &our_end, runc_end.as_ref(), &mut verdict)?,
    }
    Ok(verdict)
}

fn run(case: &Case, ours: &Side, runc: &Side, alone: bool) -> Outcome<(End, Option<End>)> {
    let our_bundle = ours.bundle(case)?;
    let runc_bundle = runc.bundle(case)?;
    let ends = (|| {
        if let Some(code) = case.code {
            let end = |seen: Value| End {
                started: seen["started"] != json!(false),
                error: seen["error"].as_str().unwrap_or_default().to_owned(),
                seen: json!({ "started": true, "status": case.status, "view": seen }),
                took: std::time::Duration::ZERO,
            };
            let our_end = end(code(ours, our_bundle.clone())?);
            let runc_end = if alone {
                None
            } else {
                Some(end(code(runc, runc_bundle.clone())?))
            };
            return Ok((our_end, runc_end));
        }
        let ours_runs = ours.spawn(&our_bundle)?;
        let runc_runs = if alone {
            None
        } else {
            Some(runc.spawn(&runc_bundle)?)
        };
        let our_end = ours.end(&our_bundle, ours_runs)?;
        let runc_end = match runc_runs {
            // Under load the last output of a container that ends at once is lost by runc's shim now and then.
            Some(running) => Some(match runc.end(&runc_bundle, running)? {
                end if end.lost_words() => runc.run(&runc_bundle)?,
                end => end,
            }),
            None => None,
        };
        Ok((our_end, runc_end))
    })();
    ours.forget(&our_bundle);
    runc.forget(&runc_bundle);
    ends
}

/// What the report says of a side: of what it saw, the part that the case is about.
fn told(case: &Case, end: &End) -> String {
    if !end.started {
        return end.error.clone();
    }
    let view = &end.seen["view"];
    match (&case.both, view) {
        (Value::Object(_), Value::Object(_)) => part(&case.both, view).to_string(),
        _ if *view == json!("") => format!("status {}", end.seen["status"]),
        _ => view.to_string(),
    }
}

/// The places of `view` that `wanted` names; of a flat object, all of it.
fn part(wanted: &Value, view: &Value) -> Value {
    match (wanted, view) {
        (Value::Object(keys), Value::Object(all)) => {
            let flat = all.values().all(|value| !value.is_object());
            let picked = all
                .iter()
                .filter(|(key, _)| flat && all.len() < 6 || keys.contains_key(*key))
                .map(|(key, value)| {
                    let inner = keys.get(key).unwrap_or(&Value::Null);
                    (key.clone(), part(inner, value))
                });
            picked.collect::<serde_json::Map<_, _>>().into()
        }
        _ => view.clone(),
    }
}

/// The error must name what is wrong.
fn said(end: &End, words: &[&str]) -> Outcome {
    match words.iter().find(|word| !end.error.contains(**word)) {
        None => Ok(()),
        Some(word) => Err(failed(format!(
            "the error does not say `{word}`: {}",
            end.error
        ))),
    }
}

fn compare(
    case: &Case,
    host: &Host,
    ours: &End,
    runc: Option<&End>,
    verdict: &mut Verdict,
) -> Outcome {
    let mut wrong = Vec::new();
    for (name, end) in [("Bulkhead", Some(ours)), ("runc", runc)] {
        let Some(end) = end else { continue };
        if !end.started {
            wrong.push(format!("{name} refuses: {}", end.error));
            continue;
        }
        let skip_view = name == "runc" && case.needs_v2 && !host.cgroup_v2;
        let mut lines = missing(&json!({ "status": case.status }), &end.seen);
        if !skip_view {
            lines.extend(missing(&case.both, &end.seen["view"]));
        }
        if name == "Bulkhead" {
            lines.extend(missing(&case.ours, &end.seen["view"]));
        }
        wrong.extend(lines.into_iter().map(|line| format!("{name}: {line}")));
    }
    if let Some(runc) = runc
        && (!case.needs_v2 || host.cgroup_v2)
    {
        for difference in differences(&ours.seen["view"], &runc.seen["view"]) {
            match explained::of(host, &case.name, &difference) {
                Some(why) => verdict.explained.push(Reason {
                    difference,
                    why: why.into(),
                }),
                None if ours.started && runc.started => wrong.push(format!(
                    "unexplained: {}: Bulkhead {}, runc {}",
                    difference.place(),
                    difference.ours,
                    difference.runc
                )),
                None => {}
            }
        }
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(failed(wrong.join("\n         ")))
    }
}
