//! `containerd-shim-bulkhead-v1`: the commands `start` and `delete`, and the shim's daemon.

use std::{
    env,
    io::{IsTerminal, Read, Write, stdin, stdout},
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use bulkhead_shim::{
    args::Args,
    bootstrap,
    config::Config,
    delete,
    events::{Publisher, Route},
    features::{self, RUNTIME},
    logging,
    task::Service,
};
use protobuf::Message;
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    sync::Notify,
    time::timeout,
};
use ttrpc::r#async::{Server, transport::Listener};

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
    let config = Config::load()?;
    match args.action.as_str() {
        "start" => {
            let answer = bootstrap::start(&args)?;
            Ok(stdout().write_all(answer.as_bytes())?)
        }
        "delete" => {
            let response = delete::delete(&args, &config)?;
            Ok(stdout().write_all(&response.write_to_bytes()?)?)
        }
        "" => serve(&args, config),
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

/// The daemon: serves until containerd says shutdown, or a signal ends the pod.
fn serve(args: &Args, config: Config) -> anyhow::Result<()> {
    let listener = bootstrap::inherited_listener()
        .context("no listening socket: this is started by `start`, and that by containerd")?;
    let name = format!("{}/{}", args.namespace, args.id);
    logging::start(Path::new("."), &name, args.debug);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(8)
        .build()?;
    runtime.block_on(async {
        listener.set_nonblocking(true)?;
        let served = serve_on(args, config, UnixListener::from_std(listener)?).await;
        if let Err(error) = &served {
            tracing::error!(%error, "the shim ends");
        }
        served
    })?;
    // Blocking calls that still hang (a peer that does not answer) do not keep the process.
    runtime.shutdown_timeout(Duration::from_millis(100));
    Ok(())
}

async fn serve_on(args: &Args, config: Config, listener: UnixListener) -> anyhow::Result<()> {
    let socket = bootstrap::socket_path(&args.address, &args.namespace, &args.id);
    let events = Publisher::start(
        &args.namespace,
        Route::new(&args.address, &args.publish_binary),
    );
    let shutdown = Arc::new(Notify::new());
    let service = Service::new(
        config,
        &args.namespace,
        &args.id,
        events.clone(),
        shutdown.clone(),
    );
    let mut server = Server::new()
        .add_listener(Listener::from(listener))
        .register_service(service.register());
    server.start().await?;
    tracing::debug!("serving");
    // A Go shim ends on these, too; containerd then calls `delete`.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        () = shutdown.notified() => {}
        () = service.unused(UNUSED_LIMIT) => tracing::warn!("no pod: nobody needs this shim"),
        _ = terminate.recv() => tracing::info!("SIGTERM: the pod ends"),
        _ = interrupt.recv() => tracing::info!("SIGINT: the pod ends"),
    }
    service.stop().await;
    events.flush(Duration::from_secs(3)).await;
    // The socket goes first, so that the next pod of this name finds no half-dead shim.
    bootstrap::remove_socket(&socket)?;
    let _ = timeout(Duration::from_millis(500), server.shutdown()).await;
    Ok(())
}
