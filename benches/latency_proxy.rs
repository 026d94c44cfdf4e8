//! latency_proxy ADDRESS:PORT MILLISECONDS: a TCP proxy before that server that is as far away as those milliseconds say,
//! there and back. Prints the address that it listens on, a port of loopback, and ends with its standard input.
//!
//! What a client sends waits where the server spoke last, or nobody did: at each request, and at each step of a TLS
//! handshake. It knows nothing of what passes, so that TLS and signatures hold.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

const PIECE_BYTES: usize = 256 << 10;

/// Hands on all that comes; `before` is called before each piece that is.
fn pass(mut from: TcpStream, mut to: TcpStream, before: impl Fn()) {
    let mut piece = vec![0; PIECE_BYTES];
    while let Ok(length @ 1..) = from.read(&mut piece) {
        before();
        if to.write_all(&piece[..length]).is_err() {
            break;
        }
    }
    // One direction may end before the other; an error ends both by itself.
    let _ = to.shutdown(Shutdown::Write);
}

fn serve(client: TcpStream, upstream: SocketAddr, latency: Duration) -> io::Result<()> {
    let server = TcpStream::connect(upstream)?;
    for socket in [&client, &server] {
        socket.set_nodelay(true)?;
    }
    let server_spoke_last = Arc::new(AtomicBool::new(true));
    let (requests, responses) = (Arc::clone(&server_spoke_last), server_spoke_last);
    let (from_server, to_client) = (server.try_clone()?, client.try_clone()?);
    thread::spawn(move || pass(from_server, to_client, || responses.store(true, Ordering::Relaxed)));
    pass(client, server, || {
        if requests.swap(false, Ordering::Relaxed) {
            thread::sleep(latency);
        }
    });
    Ok(())
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [upstream, latency] = &arguments[..] else { return usage() };
    let (Ok(upstream), Ok(latency)) = (upstream.parse(), latency.parse().map(Duration::from_millis)) else {
        return usage();
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port of loopback");
    println!("{}", listener.local_addr().expect("the port"));
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            thread::spawn(move || serve(client, upstream, latency));
        }
    });
    // Whoever started us holds the other end: it closes with them.
    let _ = io::copy(&mut io::stdin(), &mut io::sink());
}

fn usage() {
    eprintln!("usage: latency_proxy ADDRESS:PORT MILLISECONDS");
    std::process::exit(2);
}
