//! `cargo e2e proxy`: the fault proxy in front of a real publisher.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use super::{Faults, Proxy, Which};

/// Flags of the proxy. WHICH is none, all, end (the END markers of replays), nth:K, every:N or a probability.
#[derive(Clone, Debug, Args)]
pub struct ProxyArgs {
    /// Where subscribers connect.
    #[arg(long)]
    listen: SocketAddr,
    /// The publisher's PUB or ROUTER socket.
    #[arg(long)]
    upstream: SocketAddr,
    /// Milliseconds added to the way of every byte.
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
    /// At most so many milliseconds more, at random.
    #[arg(long, default_value_t = 0)]
    jitter_ms: u64,
    /// Messages that are lost.
    #[arg(long, value_name = "WHICH", default_value = "none")]
    drop: Which,
    /// Messages that come twice.
    #[arg(long, value_name = "WHICH", default_value = "none")]
    duplicate: Which,
    /// Messages in whose last frame the connection ends.
    #[arg(long, value_name = "WHICH", default_value = "none")]
    truncate: Which,
    /// Messages that arrive unreadable.
    #[arg(long, value_name = "WHICH", default_value = "none")]
    corrupt: Which,
    /// Bytes per second, for each connection and direction.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    bandwidth: Option<u64>,
    /// Let nothing through from this many seconds after the start on.
    #[arg(long)]
    blackhole_after: Option<u64>,
    /// End all connections every so many seconds.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    kill_every: Option<u64>,
    /// Seed of everything random.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl ProxyArgs {
    fn faults(&self) -> Faults {
        Faults {
            delay: Duration::from_millis(self.delay_ms),
            jitter: Duration::from_millis(self.jitter_ms),
            drop: self.drop,
            duplicate: self.duplicate,
            truncate: self.truncate,
            corrupt: self.corrupt,
            bandwidth: self.bandwidth,
            blackhole: false,
        }
    }
}

/// Runs the proxy until it is killed, and says once per second what it did, when it did something.
///
/// # Errors
/// When the address is taken.
pub fn run_proxy(args: &ProxyArgs) -> Result<()> {
    let proxy = Proxy::listen(args.listen, args.upstream, args.seed).context("cannot start the proxy")?;
    proxy.set(args.faults());
    println!("{} in front of {}, seed {}", proxy.endpoint(), args.upstream, args.seed);
    let mut shown = proxy.counts();
    for second in 1_u64.. {
        std::thread::sleep(Duration::from_secs(1));
        if args.blackhole_after == Some(second) {
            proxy.set(Faults { blackhole: true, ..args.faults() });
            println!("nothing goes through from now on");
        }
        if args.kill_every.is_some_and(|every| second.is_multiple_of(every)) {
            proxy.kill();
        }
        if proxy.counts() != shown {
            shown = proxy.counts();
            println!("{shown}");
        }
    }
    Ok(())
}
