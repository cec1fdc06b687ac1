//! The guest's `/init` of `tests/hostile`: one attack, by the name in `/attack`, then the machine restarts or goes on
//! for ever. Nothing here is an agent's work but what an attack needs to be heard.

mod service;

use std::{fs, time::Duration};

use bulkhead_protocol::{
    VERSION,
    limits::{AGENT_PORT, READY_PORT},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{sleep, timeout},
};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

/// How long a flood lasts.
const FLOOD: Duration = Duration::from_secs(3);

fn main() {
    let attack = fs::read_to_string("/attack").unwrap_or_default();
    println!("hostile agent: {attack}");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(run(attack.trim())),
        Err(error) => println!("hostile agent: {error}"),
    }
    restart();
}

fn restart() {
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
}

async fn run(attack: &str) {
    match attack {
        "never_ready" => for_ever().await,
        "wrong_version" => {
            say(b"ready 0.0.0-hostile\n").await;
            for_ever().await;
        }
        "garbage_on_the_ready_port" => loop {
            say(&[0xff; 4000]).await;
            say(b"ready").await;
            say(b"\n\n\n").await;
        },
        "ready_line_without_end" => loop {
            if let Ok(mut host) = dial(READY_PORT).await {
                while host.write_all(&[b'x'; 4096]).await.is_ok() {}
            }
        },
        "half_a_ready_line" => {
            let mut held = Vec::new();
            loop {
                if let Ok(mut host) = dial(READY_PORT).await {
                    let _ = host.write_all(b"rea").await;
                    held.push(host);
                }
                sleep(Duration::from_millis(10)).await;
            }
        }
        "ready_and_gone" => say_ready().await,
        "ready_and_deaf" => {
            say_ready().await;
            for_ever().await;
        }
        "ready_a_thousand_times" => {
            for _ in 0..1000 {
                say_ready().await;
            }
        }
        "console_flood" => {
            let flood = tokio::task::spawn_blocking(|| {
                let start = std::time::Instant::now();
                let line = "Kernel panic - not syncing: \u{1b}[2J\u{7} hostile \0".repeat(40);
                while start.elapsed() < FLOOD {
                    print!("{line}");
                }
            });
            let _ = flood.await;
        }
        "connections_to_every_port" => storm().await,
        "half_a_frame" => frames(&[0, 0, 0, 9, 0, 0], 1).await,
        "frame_of_four_gigabytes" => frames(&[0xff; 64 << 10], 64).await,
        "answers_that_nobody_asked_for" => {
            // Bodies of nothing, streams that do not exist.
            let frame = |stream: u32| [&[0; 4][..], &stream.to_be_bytes(), &[2, 0]].concat();
            let many: Vec<u8> = (0..5000).flat_map(frame).collect();
            frames(&many, 20).await;
        }
        "noise_for_frames" => {
            let noise: Vec<u8> = (0..60_000u32)
                .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
                .collect();
            frames(&noise, 20).await;
        }
        attack => service::serve(attack).await,
    }
}

async fn for_ever() {
    loop {
        sleep(FLOOD).await;
    }
}

async fn dial(port: u32) -> std::io::Result<VsockStream> {
    VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port)).await
}

async fn say(line: &[u8]) {
    if let Ok(mut host) = dial(READY_PORT).await {
        let _ = host.write_all(line).await;
        let _ = host.shutdown(std::net::Shutdown::Write);
    }
}

async fn say_ready() {
    say(format!("ready {VERSION}\n").as_bytes()).await;
}

/// Every port of the host that anything could listen on, and what is there is never let go of.
async fn storm() {
    let mut held = Vec::new();
    let ports = [0..1100, u32::MAX - 8..u32::MAX, (1 << 30)..(1 << 30) + 8];
    for port in ports.into_iter().flatten() {
        if let Ok(Ok(mut host)) = timeout(Duration::from_millis(50), dial(port)).await {
            let _ = timeout(Duration::from_millis(10), host.write_all(&[0; 4096])).await;
            held.push(host);
        }
    }
    for _ in 0..2000 {
        if let Ok(Ok(host)) = timeout(Duration::from_millis(50), dial(READY_PORT)).await
            && held.len() < 500
        {
            held.push(host);
        }
    }
    println!("hostile agent: {} connections", held.len());
}

/// Is ready, and answers every call with `bytes`, so many times; then hangs up.
async fn frames(bytes: &[u8], times: usize) {
    let Ok(listener) = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, AGENT_PORT)) else {
        return;
    };
    say_ready().await;
    while let Ok((mut call, _)) = listener.accept().await {
        let bytes = bytes.to_vec();
        tokio::spawn(async move {
            let _ = call.read(&mut [0; 4096]).await;
            for _ in 0..times {
                if call.write_all(&bytes).await.is_err() {
                    break;
                }
            }
            sleep(Duration::from_millis(500)).await;
        });
    }
}
