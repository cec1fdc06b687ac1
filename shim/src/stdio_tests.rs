use std::{
    io::{Read, Write},
    path::Path,
    process::Command,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Mutex,
};

use super::*;

fn fifo(dir: &Path, name: &str) -> String {
    let path = dir.join(name);
    assert!(
        Command::new("mkfifo")
            .arg(&path)
            .status()
            .unwrap()
            .success()
    );
    path.display().to_string()
}

fn keep() -> Keep {
    Keep::new(&Kept::nothing(), "web", "")
}

/// A process's guest side: the pumps, and the peers of the streams in the order of their connection.
async fn started(paths: &Paths) -> (Pumps, Vec<UnixStream>) {
    let peers = Mutex::new(Vec::new());
    let pumps = Io::open(paths, keep())
        .await
        .unwrap()
        .start(async |_| {
            let (ours, theirs) = UnixStream::pair()?;
            peers.lock().await.push(theirs);
            Ok(ours)
        })
        .await
        .unwrap();
    pumps.begin_stdin();
    // Opens the fifo before a test opens its end, which would block this one thread.
    sleep(Duration::from_millis(20)).await;
    (pumps, peers.into_inner())
}

#[tokio::test]
async fn everything_written_before_the_end_arrives_and_then_the_fifo_ends() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths {
        stdout: fifo(dir.path(), "out"),
        ..Paths::default()
    };
    let (pumps, mut peers) = started(&paths).await;
    let path = paths.stdout.clone();
    let reader = tokio::task::spawn_blocking(move || {
        let mut data = Vec::new();
        fs::File::open(path)
            .unwrap()
            .read_to_end(&mut data)
            .unwrap();
        data
    });
    sleep(Duration::from_millis(50)).await;
    let mut guest = peers.pop().unwrap();
    guest.write_all(&vec![7; 1 << 20]).await.unwrap();
    drop(guest);
    pumps.drain().await;
    assert_eq!(reader.await.unwrap().len(), 1 << 20);
}

#[tokio::test]
async fn a_stuck_reader_stops_the_guest_and_is_cut_off_after_the_process_ended() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths {
        stdout: fifo(dir.path(), "out"),
        ..Paths::default()
    };
    let _stuck = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&paths.stdout)
        .unwrap();
    let (pumps, mut peers) = started(&paths).await;
    let mut guest = peers.pop().unwrap();
    let mut sent = 0;
    while let Ok(n) =
        tokio::time::timeout(Duration::from_millis(200), guest.write(&[1; 4096])).await
    {
        sent += n.unwrap();
        assert!(sent < 1 << 20, "the pump holds more than its buffers");
    }
    let start = Instant::now();
    pumps.drain().await;
    assert!(start.elapsed() < DRAIN_SILENCE * 2);
}

#[tokio::test]
async fn stdin_ends_by_close_io_after_what_is_in_the_fifo() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths {
        stdin: fifo(dir.path(), "in"),
        ..Paths::default()
    };
    let (pumps, mut peers) = started(&paths).await;
    let mut guest = peers.pop().unwrap();
    // A first writer comes and goes: that is not the end.
    let mut writer = fs::OpenOptions::new()
        .write(true)
        .open(&paths.stdin)
        .unwrap();
    writer.write_all(b"one ").unwrap();
    drop(writer);
    let mut first = [0; 4];
    guest.read_exact(&mut first).await.unwrap();
    let mut writer = fs::OpenOptions::new()
        .write(true)
        .open(&paths.stdin)
        .unwrap();
    writer.write_all(&[b'x'; 1000]).unwrap();
    pumps.close_stdin();
    drop(writer);
    let mut rest = Vec::new();
    guest.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest.len(), 1000);
}

#[tokio::test]
async fn stdin_ends_by_close_io_also_when_a_writer_stays() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths {
        stdin: fifo(dir.path(), "in"),
        ..Paths::default()
    };
    let (pumps, mut peers) = started(&paths).await;
    let mut writer = fs::OpenOptions::new()
        .write(true)
        .open(&paths.stdin)
        .unwrap();
    writer.write_all(b"data").unwrap();
    pumps.close_stdin();
    let mut rest = Vec::new();
    peers.pop().unwrap().read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"data");
}

#[tokio::test]
async fn files_are_appended_to_and_other_schemes_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    fs::write(&log, "before\n").unwrap();
    let paths = Paths {
        stdout: format!("file://{}", log.display()),
        ..Paths::default()
    };
    let (pumps, mut peers) = started(&paths).await;
    peers.pop().unwrap().write_all(b"after\n").await.unwrap();
    pumps.drain().await;
    assert_eq!(fs::read_to_string(&log).unwrap(), "before\nafter\n");
    for uri in ["binary:///bin/logger?a=b", "relative", "npipe://x"] {
        let (keep, mut kept) = (keep(), HashMap::new());
        let opened = open_sink("stdout", uri, role::STDOUT_SINK, &keep, &mut kept).await;
        let error = opened.err().unwrap().to_string();
        assert!(
            error.contains(uri) && error.contains("not supported"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn with_a_terminal_there_is_no_stderr() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths {
        stdout: fifo(dir.path(), "out"),
        stderr: "/no/such".into(),
        terminal: true,
        ..Paths::default()
    };
    let request = Io::open(&paths, keep()).await.unwrap().request();
    assert!(request.terminal && request.stdout && !request.stderr);
}
