//! containerd's events as `ctr events` prints them.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{
    command::Running,
    failure::{Failure, Outcome},
    suite::Suite,
};

/// One event.
#[derive(Clone, Debug)]
pub struct Event {
    /// For example `/tasks/exit`.
    pub topic: String,
    /// Its fields.
    pub fields: Value,
    /// When it was, since midnight.
    pub time: Duration,
}

/// A running `ctr events`.
#[derive(Debug)]
pub struct Events(Running);

impl Events {
    /// Subscribes; what happens from now on is seen.
    pub fn subscribe(suite: &Suite) -> Outcome<Self> {
        let running = suite
            .ctr(["events"])
            .limit(Duration::from_secs(3600))
            .spawn()?;
        // The client says nothing when it is subscribed: labels are set until their event arrives.
        let end = Instant::now() + suite.scale.seconds(10);
        let probe = suite.name("probe");
        while Instant::now() < end {
            suite
                .ctr([
                    "namespaces",
                    "label",
                    suite.namespace(),
                    &format!("probe={probe}"),
                ])
                .output()?;
            if running.wait_for(&probe, Duration::from_millis(300)).is_ok() {
                return Ok(Self(running));
            }
        }
        Err(Failure::Failed("ctr events does not see events".into()))
    }

    /// Every event so far of the container.
    pub fn of(&self, container: &str) -> Vec<Event> {
        self.0
            .stdout()
            .lines()
            .filter_map(parse)
            .filter(|event| event.fields["container_id"] == container)
            .collect()
    }

    /// Waits for an event of the container.
    pub fn wait_for(&self, container: &str, topic: &str, limit: Duration) -> Outcome<Event> {
        let end = Instant::now() + limit;
        loop {
            let seen = self.of(container);
            if let Some(event) = seen.iter().find(|event| event.topic == topic) {
                return Ok(event.clone());
            }
            if Instant::now() > end {
                let topics: Vec<&str> = seen.iter().map(|event| event.topic.as_str()).collect();
                return Err(Failure::Failed(format!(
                    "no event {topic} of {container} within {limit:?}; seen: {topics:?}"
                )));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// `DATE TIME ZONE NAME NAMESPACE TOPIC JSON`
fn parse(line: &str) -> Option<Event> {
    let topic = line.split(' ').find(|word| word.starts_with('/'))?;
    let json = line.get(line.find('{')?..)?;
    Some(Event {
        topic: topic.to_owned(),
        fields: serde_json::from_str(json).ok()?,
        time: time_of_day(line.split(' ').nth(1)?)?,
    })
}

/// `HH:MM:SS.fraction`
fn time_of_day(text: &str) -> Option<Duration> {
    let mut parts = text.split(':').map(|part| part.parse::<f64>().ok());
    let [hours, minutes, seconds] = [parts.next()??, parts.next()??, parts.next()??];
    Duration::try_from_secs_f64(hours * 3600.0 + minutes * 60.0 + seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_ctr_events_is_parsed() {
        let line = r#"2026-01-02 03:04:05.6 +0000 UTC ns /tasks/exit {"container_id":"c","exit_status":3}"#;
        let event = parse(line).unwrap();
        assert_eq!(event.topic, "/tasks/exit");
        assert_eq!(event.fields["exit_status"], 3);
        assert_eq!(event.time, Duration::from_millis(11_045_600));
    }
}
