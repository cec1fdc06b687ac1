//! `containerd-shim-bulkhead-v1`: the commands `start` and `delete`, and the shim's daemon: keeper and worker.

use std::{
    env,
    io::{self, IsTerminal, Read, Write, stdin, stdout},
    os::fd::OwnedFd,
    pin::Pin,
    process::ExitCode,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use anyhow::Context as _;
use bulkhead_failpoint::patience;
use bulkhead_shim::{
    args::Args,
    bootstrap, config, delete,
    events::{Publisher, Route},
    features::{self, RUNTIME},
    keeper::{self, Kept, Role},
    logging,
    sandbox::state::remove_file,
    task::Service,
};
use futures_core::Stream;
use protobuf::Message;
use tokio::{
    net::UnixStream,
    signal::unix::{SignalKind, signal},
    sync::{Notify, mpsc},
    time::{sleep, timeout},
};
use ttrpc::r#async::{Server, transport::Listener};

/// How long containerd may take to connect after `start`. It tries a socket that is not there for 100 s, and one that nobody listens on once.
const CONNECT: Duration = Duration::from_secs(1);
/// How long it may take to take a pod over. The guest has a say in it: afterwards the pod ends.
const ADOPT: Duration = Duration::from_secs(120);
/// A shim without a pod ends after this: containerd asks for the first container at once.
const UNUSED_LIMIT: Duration = Duration::from_secs(60);
/// Longest request for `-info`.
const REQUEST_MAX: u64 = 1 << 20;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd shows what a command writes.
            eprintln!("containerd-shim-bulkhead-v1: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let args = Args::parse(env::args().skip(1))?;
    if args.version {
        println!(
            "containerd-shim-bulkhead-v1: {RUNTIME} {}",
            env!("CARGO_PKG_VERSION")
        );
        return Ok(());
    }
    if args.info {
        return Ok(stdout().write_all(&info()?)?);
    }
    match args.action.as_str() {
        "start" => {
            let answer = bootstrap::start(&args)?;
            Ok(stdout().write_all(answer.as_bytes())?)
        }
        "delete" => {
            let response = delete::delete(&args, &config::state())?;
            Ok(stdout().write_all(&response.write_to_bytes()?)?)
        }
        "" => keep(&args),
        keeper::SERVE => serve(&args, inherited()?),
        other => anyhow::bail!("unknown command {other:?}: there are start and delete"),
    }
}

/// containerd writes its request to our stdin and closes it; at a terminal nobody would.
fn info() -> anyhow::Result<Vec<u8>> {
    let mut request = Vec::new();
    if !stdin().is_terminal() {
        stdin().take(REQUEST_MAX).read_to_end(&mut request)?;
    }
    let info = features::runtime_info(&request).context("reading the request on stdin")?;
    Ok(info.write_to_bytes()?)
}

fn inherited() -> anyhow::Result<OwnedFd> {
    bootstrap::inherited()
        .context("no inherited descriptor: this is started by `start`, and that by containerd")
}

/// The daemon: the keeper, and as a copy of it the first worker.
fn keep(args: &Args) -> anyhow::Result<()> {
    match keeper::run(args, inherited()?) {
        Ok(Role::Over) => Ok(()),
        Ok(Role::Worker(channel)) => serve(args, channel),
        Err(error) => {
            logging::start(args);
            tracing::error!(%error, "the keeper ends");
            Err(error.into())
        }
    }
}

/// The worker: serves until containerd says shutdown, or a signal ends the pod.
fn serve(args: &Args, channel: OwnedFd) -> anyhow::Result<()> {
    logging::start(args);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(8)
        .build()?;
    runtime.block_on(async {
        let served = serve_on(args, channel).await;
        if let Err(error) = &served {
            tracing::error!(%error, "the shim ends");
        }
        served
    })?;
    // Blocking calls that still hang (a peer that does not answer) do not keep the process.
    runtime.shutdown_timeout(Duration::from_millis(100));
    Ok(())
}

async fn serve_on(args: &Args, channel: OwnedFd) -> anyhow::Result<()> {
    let (kept, connections) = Kept::receive(channel)?;
    let socket = bootstrap::socket_path(&args.address, &args.namespace, &args.id);
    let events = Publisher::start(
        &args.namespace,
        Route::new(&args.address, &args.publish_binary),
    );
    let shutdown = Arc::new(Notify::new());
    let service = Service::new(
        config::state(),
        &args.namespace,
        &args.id,
        events.clone(),
        shutdown.clone(),
        kept.clone(),
    );
    // Before anything is taken over, so that a signal in the middle is heard.
    // A Go shim ends on the first two; containerd then calls `delete`.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    // Heard from now on: the keeper's question whether we live, too.
    let incoming = kept.connections(connections)?;
    if kept.takes_over() {
        let adopted = timeout(patience(ADOPT), service.adopt()).await;
        let adopted = adopted.context("the guest takes too long");
        if let Err(error) = adopted.and_then(|adopted| Ok(adopted?)) {
            // containerd calls `delete`, which cleans up.
            kept.end();
            return Err(error.context("taking the pod over"));
        }
    }
    let mut server = Server::new()
        .add_listener(Listener::new(Incoming(incoming)))
        .register_service(service.register());
    server.start().await?;
    tracing::debug!("serving");
    let mut orphan = false;
    tokio::select! {
        () = shutdown.notified() => {}
        () = service.unused(UNUSED_LIMIT) => tracing::warn!("no pod: nobody needs this shim"),
        () = kept.gone() => {
            tracing::error!("the keeper is gone, and containerd with it: the pod ends");
            orphan = true;
            if service.is_unused() {
                sleep(CONNECT).await;
            }
        }
        _ = terminate.recv() => tracing::info!("SIGTERM: the pod ends"),
        _ = interrupt.recv() => tracing::info!("SIGINT: the pod ends"),
        _ = hangup.recv() => {
            tracing::info!("SIGHUP: the program on the disk takes over");
            events.flush(Duration::from_secs(3)).await;
            kept.replace();
        }
    }
    kept.end();
    service.stop().await;
    events.flush(Duration::from_secs(3)).await;
    if orphan {
        bootstrap::remove_socket(&socket)?;
    } else {
        // The socket goes before the keeper, so that the next pod of this name finds no half-dead shim.
        remove_file(&socket)?;
    }
    let _ = timeout(Duration::from_millis(500), server.shutdown()).await;
    Ok(())
}

/// containerd's connections, for the server.
struct Incoming(mpsc::Receiver<io::Result<UnixStream>>);

impl Stream for Incoming {
    type Item = io::Result<UnixStream>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}
