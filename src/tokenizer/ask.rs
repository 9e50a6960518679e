//! One question's way to its tokens.

use std::sync::Arc;

use tracing::{error, info};

use super::remote::{Call, RemoteTokenizer, Targets};
use super::trust::Change;
use super::{Asked, Error, Late, Local, Space, Tokenizer, Tokens, Ways, text};
use crate::request::Question;
use crate::tokenizer::cache::CacheKey;

/// A question, and what is known of it before it is asked.
struct Asking {
    question: Arc<Question>,
    key: CacheKey,
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
        if matches!(self.ways, Ways::Text) {
            return Asked::text(&question);
        }
        let key = self.cache.key(&question);
        if let Some(tokens) = self.cache.get(key) {
            return Asked::now(Ok(tokens));
        }
        let asking = Asking { question: Arc::new(question), key };
        match &self.ways {
            Ways::Remote { remote, stand_in } => {
                let asked = self.ask_engines(remote, &asking, targets(remote)).await;
                match stand_in {
                    Some(stand_in) if asked.tokens.is_err() => self.stand_in(stand_in, &asking, asked).await,
                    Some(_) | None => asked,
                }
            }
            Ways::Local(_) => Asked::now(self.ask_local(&asking).await),
            Ways::Auto { remote, trust, .. } if trust.is_trusted() => self.ask_trusted(remote, &asking, targets).await,
            Ways::Auto { remote, .. } => {
                let asked = self.ask_engines(remote, &asking, targets(remote)).await;
                if let Ok((tokens, _)) = &asked.tokens {
                    self.compare(&asking, tokens.clone());
                }
                asked
            }
            Ways::Text => unreachable!("text has returned above"),
        }
    }

    /// Asks the engines. What is still under way when the budget ends may yet fill the cache.
    async fn ask_engines(self: &Arc<Self>, remote: &Arc<RemoteTokenizer>, asking: &Asking, targets: Targets) -> Asked {
        let mut call = remote.ask(asking.question.clone(), targets);
        let budget = self.budget.of(&asking.question);
        match tokio::time::timeout(budget, &mut call).await {
            Ok(answer) => Asked::now(answer.map(|tokens| self.keep(asking.key, tokens))),
            Err(_) => {
                call.overdue();
                Asked { tokens: Err(Error::Budget(budget)), late: Some(self.clone().keep_late(asking.key, call)) }
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

    /// Asks the local tokenizer, which keeps what it finds, also when it is late.
    async fn ask_local(self: &Arc<Self>, asking: &Asking) -> Result<Arc<Tokens>, Error> {
        let (Ways::Local(local) | Ways::Auto { local, .. }) = &self.ways else { return Err(Error::NoEndpoint) };
        let (this, key) = (self.clone(), asking.key);
        let keep = move |tokens: &Arc<Tokens>| this.cache.put(key, tokens.clone());
        local.tokens(asking.question.clone(), self.budget.of(&asking.question), keep).await
    }

    /// Asks the trusted local tokenizer, and for a sample also the engines; what it cannot do is theirs.
    async fn ask_trusted(
        self: &Arc<Self>,
        remote: &Arc<RemoteTokenizer>,
        asking: &Asking,
        targets: impl FnOnce(&RemoteTokenizer) -> Targets,
    ) -> Asked {
        match self.ask_local(asking).await {
            Ok(tokens) if self.is_audited() => {
                let call = remote.ask(asking.question.clone(), targets(remote));
                let audit = self.clone().audit(tokens.clone(), call);
                Asked { late: Some(Box::pin(audit)), ..Asked::now(Ok(tokens)) }
            }
            Err(Error::Unsupported(_)) => self.ask_engines(remote, asking, targets(remote)).await,
            found => Asked::now(found),
        }
    }

    /// Lets something else answer in the engines' place. What they may still say is kept all the same.
    async fn stand_in(&self, stand_in: &Local, asking: &Asking, asked: Asked) -> Asked {
        match stand_in {
            Local::Text => Asked { late: asked.late, ..Asked::text(&asking.question) },
            Local::Workers(local) => {
                // Not kept: nobody has compared it.
                let found = local.tokens(asking.question.clone(), self.budget.of(&asking.question), |_| ()).await;
                match found {
                    Ok(tokens) => Asked { late: asked.late, ..Asked::now(Ok(tokens)) },
                    Err(_) => asked,
                }
            }
        }
    }

    fn is_audited(&self) -> bool {
        matches!(&self.ways, Ways::Auto { trust, .. } if trust.is_audited())
    }

    /// Compares what the local tokenizer has said with what the engines say.
    async fn audit(self: Arc<Self>, local: Arc<Tokens>, call: Call) {
        if let Ok(tokens) = call.await {
            self.compared(local.ids == tokens.ids);
        }
    }

    /// Has the local tokenizer say what the engines have said, off the request's path.
    fn compare(self: &Arc<Self>, asking: &Asking, tokens: Arc<Tokens>) {
        if let Ways::Auto { local, .. } = &self.ways {
            let this = self.clone();
            local.in_passing(asking.question.clone(), move |local| this.compared(local.ids == tokens.ids));
        }
    }

    fn compared(&self, is_equal: bool) {
        let Ways::Auto { trust, .. } = &self.ways else { return };
        match trust.compared(is_equal) {
            Change::Gained => {
                info!(model = %self.model, "local tokenizer agrees with the engines and is used from now on");
            }
            Change::Lost => {
                // Some of it may be wrong as well.
                self.cache.clear();
                error!(model = %self.model, "local tokenizer differs from the engines and is used no more");
            }
            Change::Nothing => {}
        }
    }
}
