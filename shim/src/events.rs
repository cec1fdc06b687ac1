//! Events to containerd, in the order in which they were queued (runtime v2, "Events").
//!
//! One task sends them over containerd's ttrpc socket; without one, through containerd's binary (`publish`).

use std::{
    env, io,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use containerd_shim_protos::{
    api::Empty,
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
        TaskResumed, TaskStart,
    },
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::{Client, EventsClient},
    topics,
};
use protobuf::{Message, MessageFull, well_known_types::any::Any};
use tokio::{
    io::AsyncWriteExt,
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};
use ttrpc::context;

/// Attempts for one event, a second apart.
const ATTEMPTS: u32 = 30;
/// How long sending one event may take.
const SEND: Duration = Duration::from_secs(5);

/// A message that is an event, with its topic.
pub trait Event: MessageFull {
    /// containerd's topic.
    const TOPIC: &'static str;
}

macro_rules! topics {
    ($($message:ty => $topic:ident),* $(,)?) => {
        $(impl Event for $message {
            const TOPIC: &'static str = topics::$topic;
        })*
    };
}

topics! {
    TaskCreate => TASK_CREATE_EVENT_TOPIC,
    TaskStart => TASK_START_EVENT_TOPIC,
    TaskExecAdded => TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted => TASK_EXEC_STARTED_EVENT_TOPIC,
    TaskExit => TASK_EXIT_EVENT_TOPIC,
    TaskDelete => TASK_DELETE_EVENT_TOPIC,
    TaskOOM => TASK_OOM_EVENT_TOPIC,
    TaskPaused => TASK_PAUSED_EVENT_TOPIC,
    TaskResumed => TASK_RESUMED_EVENT_TOPIC,
}

/// Why an event was not sent.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("over ttrpc: {0}")]
    Ttrpc(#[from] ttrpc::Error),
    #[error("running containerd's binary: {0}")]
    Io(#[from] io::Error),
    #[error("encoding: {0}")]
    Encode(#[from] protobuf::Error),
    #[error("containerd's publish: {0}")]
    Publish(ExitStatus),
}

enum Item {
    Event(Box<Envelope>, Option<Box<dyn FnOnce() + Send>>),
    Flush(oneshot::Sender<()>),
}

/// The queue's end that events go into. Cheap to clone.
#[derive(Clone)]
pub struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Item>,
}

/// How events reach containerd.
#[derive(Clone, Debug, Default)]
pub struct Route {
    /// containerd's ttrpc socket.
    pub ttrpc: Option<String>,
    /// containerd's binary.
    pub binary: String,
    /// containerd's main socket, for the binary.
    pub address: String,
}

impl Route {
    /// The route that containerd gave in environment and flags.
    pub fn new(address: &str, binary: &str) -> Self {
        let ttrpc = env::var("TTRPC_ADDRESS")
            .ok()
            .filter(|a| !a.is_empty())
            .or_else(|| (!address.is_empty()).then(|| format!("{address}.ttrpc")));
        Self {
            ttrpc,
            binary: binary.into(),
            address: address.into(),
        }
    }
}

impl Publisher {
    /// Starts the task that sends.
    pub fn start(namespace: &str, route: Route) -> Self {
        let (queue, items) = mpsc::channel(crate::limits::EVENTS);
        tokio::spawn(run(route, items));
        Self {
            namespace: namespace.into(),
            queue,
        }
    }

    /// Queues an event.
    pub fn publish<E: Event>(&self, event: &E) {
        self.queue(event, None);
    }

    /// The same, and `done` once containerd has it.
    pub fn publish_then<E: Event>(&self, event: &E, done: impl FnOnce() + Send + 'static) {
        self.queue(event, Some(Box::new(done)));
    }

    fn queue<E: Event>(&self, event: &E, done: Option<Box<dyn FnOnce() + Send>>) {
        let mut any = Any::new();
        any.type_url = E::descriptor().full_name().to_owned();
        match event.write_to_bytes() {
            Ok(bytes) => any.value = bytes,
            Err(error) => return tracing::error!(%error, topic = E::TOPIC, "encoding an event"),
        }
        let mut envelope = Envelope::new();
        envelope.set_timestamp(crate::task::now());
        envelope.namespace.clone_from(&self.namespace);
        envelope.topic = E::TOPIC.into();
        envelope.event = Some(any).into();
        if self
            .queue
            .try_send(Item::Event(Box::new(envelope), done))
            .is_err()
        {
            tracing::error!(topic = E::TOPIC, "event lost: the queue is full");
        }
    }

    /// Waits until everything queued before was sent, for a while.
    pub async fn flush(&self, limit: Duration) {
        let (done, wait) = oneshot::channel();
        let flushed = async {
            self.queue.send(Item::Flush(done)).await.ok()?;
            wait.await.ok()
        };
        if timeout(limit, flushed).await.is_err() {
            tracing::warn!("events are still waiting for containerd");
        }
    }
}

async fn run(route: Route, mut items: mpsc::Receiver<Item>) {
    let mut client = None;
    while let Some(item) = items.recv().await {
        match item {
            Item::Flush(done) => drop(done.send(())),
            Item::Event(envelope, done) => {
                if deliver(&route, &mut client, *envelope).await
                    && let Some(done) = done
                {
                    done();
                }
            }
        }
    }
}

/// Whether it was delivered.
async fn deliver(route: &Route, client: &mut Option<EventsClient>, envelope: Envelope) -> bool {
    for attempt in 0..ATTEMPTS {
        // The first repetition at once: a connection from before containerd's restart fails like this.
        if attempt > 1 {
            sleep(Duration::from_secs(1)).await;
        }
        let sent = match &route.ttrpc {
            Some(address) => forward(address, client, &envelope).await,
            None => publish_by_binary(route, &envelope).await,
        };
        match sent {
            Ok(()) => return true,
            Err(error) => {
                tracing::warn!(%error, topic = envelope.topic, attempt, "sending an event");
                *client = None;
            }
        }
    }
    tracing::error!(topic = envelope.topic, "event lost");
    false
}

async fn forward(
    address: &str,
    client: &mut Option<EventsClient>,
    envelope: &Envelope,
) -> Result<(), Error> {
    let events = match client {
        Some(events) => events,
        None => {
            let address = match address.contains("://") {
                true => address.to_owned(),
                false => format!("unix://{address}"),
            };
            client.insert(EventsClient::new(Client::connect(&address).await?))
        }
    };
    let mut request = ForwardRequest::new();
    request.envelope = Some(envelope.clone()).into();
    let mut ctx = context::with_duration(SEND);
    ctx.add(
        "containerd-namespace-ttrpc".into(),
        envelope.namespace.clone(),
    );
    let _: Empty = events.forward(ctx, &request).await?;
    Ok(())
}

async fn publish_by_binary(route: &Route, envelope: &Envelope) -> Result<(), Error> {
    let mut child = tokio::process::Command::new(&route.binary)
        .args(["--address", &route.address, "publish", "--topic"])
        .args([&envelope.topic, "--namespace", &envelope.namespace])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let bytes = envelope.event.write_to_bytes()?;
    let sending = async {
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(&bytes).await?;
        }
        child.wait().await
    };
    let status = timeout(SEND, sending)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    if status.success() {
        return Ok(());
    }
    Err(Error::Publish(status))
}

#[cfg(test)]
mod tests {
    use std::{
        path::Path,
        sync::{Arc, Mutex},
    };

    use async_trait::async_trait;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    #[derive(Default)]
    struct Containerd(Mutex<Vec<(String, String)>>);

    #[async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, req: ForwardRequest) -> ttrpc::Result<Empty> {
            let e = req.envelope;
            let event = e.event.type_url.clone();
            self.0.lock().unwrap().push((e.topic.clone(), event));
            Ok(Empty::new())
        }
    }

    async fn serve(path: &Path, containerd: Arc<Containerd>) -> Server {
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(create_events(containerd));
        server.start().await.unwrap();
        server
    }

    #[tokio::test]
    async fn events_keep_their_order_and_wait_for_containerd() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock.ttrpc");
        let route = Route {
            ttrpc: Some(path.display().to_string()),
            ..Route::default()
        };
        let publisher = Publisher::start("default", route);
        publisher.publish(&TaskCreate::new());
        publisher.publish(&TaskStart::new());
        publisher.publish(&TaskExit::new());
        sleep(Duration::from_millis(100)).await;
        let containerd = Arc::new(Containerd::default());
        let mut server = serve(&path, containerd.clone()).await;
        publisher.flush(Duration::from_secs(5)).await;
        let seen = containerd.0.lock().unwrap().clone();
        let seen: Vec<_> = seen.iter().map(|(t, e)| (t.as_str(), e.as_str())).collect();
        assert_eq!(
            seen,
            [
                ("/tasks/create", "containerd.events.TaskCreate"),
                ("/tasks/start", "containerd.events.TaskStart"),
                ("/tasks/exit", "containerd.events.TaskExit"),
            ]
        );
        server.shutdown().await.unwrap();
    }
}
