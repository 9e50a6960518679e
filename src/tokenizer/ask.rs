//! One question's way to its tokens.
//!
//! A question has one deadline. Whoever is asked second gets what the first has left of it.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{error, info};

use super::cache::CacheKey;
use super::remote::{Call, RemoteTokenizer, Targets};
use super::trust::{Change, Kind};
use super::workers::Workers;
use super::{Asked, Auto, Error, Late, Local, Space, Tokenizer, Tokens, Ways, text};
use crate::request::Question;

/// Longest question that is asked, in bytes: the text of some two million tokens, which no model takes. It bounds what
/// the questions and answers under way hold.
const MAX_QUESTION: usize = 8 << 20;

/// A question, and what is known of it before it is asked.
struct Asking {
    question: Arc<Question>,
    key: CacheKey,
    budget: Duration,
    until: Instant,
}

impl Asking {
    /// What is left of the budget.
    fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }
}

impl Asked {
    fn now(tokens: Result<Arc<Tokens>, Error>) -> Self {
        Self { tokens: tokens.map(|tokens| (tokens, Space::Model)), late: None }
    }

    fn text(question: &Question) -> Self {
        let ids = text::ids(question);
        Self { tokens: Ok((Arc::new(Tokens { ids, ..Tokens::default() }), Space::Text)), late: None }
    }
}

impl Tokenizer {
    /// The tokens of a prompt, within its budget. `targets` chooses whom to ask, if anyone has to be asked.
    ///
    /// Dropping the future ends the calls that it has made.
    pub async fn tokens(
        self: &Arc<Self>,
        question: Question,
        targets: impl FnOnce(&RemoteTokenizer) -> Targets,
    ) -> Asked {
        if question.body.len() > MAX_QUESTION {
            return Asked::now(Err(Error::TooLong));
        }
        if matches!(self.ways, Ways::Text) {
            return Asked::text(&question);
        }
        let key = self.cache.key(&question, self.ways.epoch());
        if let Some(tokens) = self.cache.get(key) {
            return Asked::now(Ok(tokens));
        }
        let budget = self.budget.of(&question);
        let asking = Asking { question: Arc::new(question), key, budget, until: Instant::now() + budget };
        let asked = match &self.ways {
            Ways::Remote { remote, .. } => self.ask_engines(remote, &asking, targets(remote)).await,
            Ways::Auto(auto) => self.ask_either(auto, &asking, targets).await,
            Ways::Local(local) => Asked::now(self.ask_local(local, &asking).await),
            Ways::Text => Asked::text(&asking.question),
        };
        match (&asked.tokens, self.ways.stand_in()) {
            (Err(_), Some(stand_in)) => self.stand_in(&stand_in, &asking, asked).await,
            _ => asked,
        }
    }

    /// Asks the engines. What is still under way when the budget ends may yet fill the cache.
    async fn ask_engines(self: &Arc<Self>, remote: &Arc<RemoteTokenizer>, asking: &Asking, targets: Targets) -> Asked {
        let mut call = remote.ask(asking.question.clone(), targets);
        let patience = match self.ways.stand_in() {
            // It needs the other half.
            Some(Local::Workers(_)) => asking.left() / 2,
            Some(Local::Text) | None => asking.left(),
        };
        match tokio::time::timeout(patience, &mut call).await {
            Ok(answer) => Asked::now(answer.map(|tokens| self.keep(asking.key, tokens))),
            Err(_) => {
                call.overdue();
                Asked {
                    tokens: Err(Error::Budget(asking.budget)),
                    late: Some(self.clone().keep_late(asking.key, call)),
                }
            }
        }
    }

    fn keep_late(self: Arc<Self>, key: CacheKey, call: Call) -> Late {
        Box::pin(async move {
            if let Ok(tokens) = call.await {
                self.keep(key, tokens);
            }
        })
    }

    fn keep(&self, key: CacheKey, tokens: Tokens) -> Arc<Tokens> {
        let tokens = Arc::new(tokens);
        self.cache.put(key, tokens.clone());
        tokens
    }

    /// Asks a local tokenizer, which keeps what it finds, also when it is late.
    async fn ask_local(self: &Arc<Self>, local: &Workers, asking: &Asking) -> Result<Arc<Tokens>, Error> {
        let (this, key) = (self.clone(), asking.key);
        let keep = move |tokens: &Arc<Tokens>| this.cache.put(key, tokens.clone());
        local.tokens(asking.question.clone(), asking.left(), keep).await
    }

    /// Asks the engines, or the local tokenizer where that is trusted.
    async fn ask_either(
        self: &Arc<Self>,
        auto: &Auto,
        asking: &Asking,
        targets: impl FnOnce(&RemoteTokenizer) -> Targets,
    ) -> Asked {
        let Auto { remote, local, trust, .. } = auto;
        let kind = Kind::of(&asking.question);
        if trust.is_trusted(kind) {
            match self.ask_local(local, asking).await {
                Ok(tokens) if trust.is_audited() => {
                    let call = remote.ask(asking.question.clone(), targets(remote));
                    let audit = self.clone().audit(kind, tokens.clone(), call);
                    return Asked { late: Some(Box::pin(audit)), ..Asked::now(Ok(tokens)) };
                }
                Ok(tokens) => return Asked::now(Ok(tokens)),
                // A tokenizer that does that is not the engines'.
                Err(Error::Panicked) => self.compared(kind, false),
                Err(_) => {}
            }
            return self.ask_engines(remote, asking, targets(remote)).await;
        }
        let asked = self.ask_engines(remote, asking, targets(remote)).await;
        if let Ok((tokens, _)) = &asked.tokens {
            // The local tokenizer says the same off the request's path, if it has the time.
            let (this, tokens) = (self.clone(), tokens.clone());
            let compare = move |local: &Tokens| this.compared(kind, local.ids == tokens.ids);
            local.in_passing(asking.question.clone(), compare);
        }
        asked
    }

    /// Lets something else answer in the engines' place. What they may still say is kept all the same.
    async fn stand_in(&self, stand_in: &Local<'_>, asking: &Asking, asked: Asked) -> Asked {
        let found = match stand_in {
            Local::Text => Asked::text(&asking.question),
            // Not kept: nobody has compared it.
            Local::Workers(local) => Asked::now(local.tokens(asking.question.clone(), asking.left(), |_| ()).await),
        };
        if found.tokens.is_err() {
            return asked;
        }
        self.n_stood_in.fetch_add(1, Relaxed);
        Asked { late: asked.late, ..found }
    }

    /// Compares what the local tokenizer has said with what the engines say.
    async fn audit(self: Arc<Self>, kind: Kind, local: Arc<Tokens>, call: Call) {
        if let Ok(tokens) = call.await {
            self.compared(kind, local.ids == tokens.ids);
        }
    }

    fn compared(&self, kind: Kind, is_equal: bool) {
        let Ways::Auto(Auto { trust, .. }) = &self.ways else { return };
        match trust.compared(kind, is_equal) {
            Change::Gained => {
                let kind = kind.as_str();
                info!(model = %self.model, kind, "local tokenizer agrees with the engines and is used from now on");
            }
            Change::Lost => {
                // Some of it may be wrong as well.
                self.cache.forget();
                error!(model = %self.model, "local tokenizer differs from the engines and is not used any more");
            }
            Change::Nothing => {}
        }
    }
}
