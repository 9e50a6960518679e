//! A server that is asked for tokens and does as it is told, down to its connections.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What a question gets.
#[derive(Clone, Debug)]
pub(crate) enum Reply {
    /// A list of these tokens.
    Ids(&'static [u32]),
    Status(u16),
    Text(&'static str),
    /// Nothing, until it is told otherwise.
    Silence,
    /// More than anyone wants.
    Endless,
    /// The end of the connection, once the question is read.
    HangUp,
}

/// What requests get, and what the checks off the request path get.
#[derive(Clone, Debug)]
struct Script {
    requests: Reply,
    checks: Reply,
}

#[derive(Default)]
struct Seen {
    /// Paths of the requests' questions.
    asked: Mutex<Vec<String>>,
    /// Paths of the checks.
    checked: Mutex<Vec<String>>,
    /// Connections that were closed on an unanswered question.
    n_given_up: AtomicUsize,
}

pub(crate) struct Stub {
    pub(crate) address: SocketAddr,
    script: watch::Sender<Script>,
    seen: Arc<Seen>,
}

impl Stub {
    /// One that gives requests `requests`, and checks a list of tokens.
    pub(crate) async fn start(requests: Reply) -> Self {
        Self::start_with(requests, Reply::Ids(&[7])).await
    }

    pub(crate) async fn start_with(requests: Reply, checks: Reply) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let script = watch::Sender::new(Script { requests, checks });
        let seen = Arc::<Seen>::default();
        let (replies, noted) = (script.subscribe(), seen.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, replies.clone(), noted.clone()));
            }
        });
        Self { address, script, seen }
    }

    /// Also for the questions that it has kept silent on.
    pub(crate) fn set_requests(&self, reply: Reply) {
        self.script.send_modify(|script| script.requests = reply);
    }

    /// Also for the checks that it has kept silent on.
    pub(crate) fn set_checks(&self, reply: Reply) {
        self.script.send_modify(|script| script.checks = reply);
    }

    /// Paths of the requests' questions so far.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.seen.asked.lock().unwrap().clone()
    }

    pub(crate) fn n_asked(&self) -> usize {
        self.seen.asked.lock().unwrap().len()
    }

    /// Paths of the checks so far.
    pub(crate) fn checked(&self) -> Vec<String> {
        self.seen.checked.lock().unwrap().clone()
    }

    pub(crate) fn n_checks(&self) -> usize {
        self.seen.checked.lock().unwrap().len()
    }

    /// Connections that were closed on an unanswered question.
    pub(crate) fn n_given_up(&self) -> usize {
        self.seen.n_given_up.load(Relaxed)
    }
}

async fn serve(mut stream: TcpStream, mut script: watch::Receiver<Script>, seen: Arc<Seen>) {
    while let Some((path, body)) = read_question(&mut stream).await {
        let is_check = body.contains("Quick brown fox");
        if is_check {
            seen.checked.lock().unwrap().push(path);
        } else {
            seen.asked.lock().unwrap().push(path);
        }
        loop {
            let Script { requests, checks } = script.borrow_and_update().clone();
            match if is_check { checks } else { requests } {
                Reply::Silence => tokio::select! {
                    changed = script.changed() => if changed.is_err() { return },
                    _ = stream.read_u8() => {
                        seen.n_given_up.fetch_add(1, Relaxed);
                        return;
                    }
                },
                reply => {
                    if answer(&mut stream, reply).await.is_none() {
                        return;
                    }
                    break;
                }
            }
        }
    }
}

/// Path and body of the next question; none at the end of the connection.
async fn read_question(stream: &mut TcpStream) -> Option<(String, String)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    let n_bytes = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    let mut body = vec![0; n_bytes.parse().unwrap()];
    stream.read_exact(&mut body).await.ok()?;
    Some((head.split(' ').nth(1).unwrap().to_owned(), String::from_utf8(body).unwrap()))
}

/// None when the connection has ended.
async fn answer(stream: &mut TcpStream, reply: Reply) -> Option<()> {
    let (status, body) = match reply {
        Reply::Ids(ids) => (200, serde_json::json!({ "count": ids.len(), "tokens": ids }).to_string()),
        Reply::Status(status) => (status, String::new()),
        Reply::Text(text) => (200, text.to_owned()),
        Reply::Endless => {
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.ok()?;
            loop {
                stream.write_all(&[b' '; 1 << 16]).await.ok()?;
            }
        }
        Reply::HangUp => {
            stream.shutdown().await.ok()?;
            stream.read_u8().await.ok()?;
            return None;
        }
        Reply::Silence => unreachable!("silence is no answer"),
    };
    let head = format!("HTTP/1.1 {status} Status\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes()).await.ok()
}
